"""How many splits attention makes: few where there is work for all, on the host and the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import AttentionBatch
from octavo.visibility import Full, Visibility, Window
from tests.kernels.cases import split_table
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention.device_plan import DevicePlan  # isort: skip
from octavo.kernels.triton.attention.short_chunks import (  # isort: skip
    Limits,
    plan_short_chunks,
    short_plan_of,
)
from octavo.kernels.triton.attention.splits import SPLIT_STEP, Tiling, cost, split_size, tiling  # isort: skip

QWEN3, QWEN15 = tiling(32, 4, 132), tiling(16, 16, 132)
FULL = Full()
LIMITS = Limits(queries=64, splits=16, shortest=512, partials=512 * 16)


def batch_of(query_lens: list[int], lengths: list[int]) -> AttentionBatch:
    def there(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return AttentionBatch(
        positions_T=there([]),
        slot_mapping_T=there([]),
        query_starts=there(np.cumsum([0, *query_lens]).tolist()),
        seq_lens_S=there(lengths),
        block_table=there([[]]),
    )


def planned(
    query_lens: list[int],
    lengths: list[int],
    tiles: Tiling,
    limits: Limits = LIMITS,
    visibility: Visibility = FULL,
) -> list[int]:
    plan = plan_short_chunks(batch_of(query_lens, lengths), tiles, visibility, limits)
    return plan.table.tolist()


def splits(tokens: int, queries: int, members: int, tiles: Tiling) -> int:
    size = split_size(((tokens, queries),) * members, tiles, most=16, shortest=512)
    return -(-tokens // size)


def test_there_are_as_few_splits_as_fill_the_processors() -> None:
    assert splits(32832, 64, 1, QWEN3) == 8, "16 pieces a split: 128 of them are one wave"
    assert splits(32832, 64, 1, QWEN15) == 8
    assert splits(32832, 64, 32, QWEN3) == 1, "512 pieces are four waves already"
    assert splits(32832, 64, 32, QWEN15) == 1
    assert splits(32768, 32, 1, QWEN3) == 16, "32 decodes: 8 pieces a split"
    assert splits(32768, 256, 1, QWEN3) == 2
    assert splits(400, 64, 1, QWEN3) == 1


def test_more_work_never_makes_more_splits_of_equal_sequences() -> None:
    for tokens, tiles in product((3000, 32768), (QWEN3, QWEN15)):
        found = [splits(tokens, 64, members, tiles) for members in (1, 2, 4, 8, 16, 32, 64)]
        assert found == sorted(found, reverse=True)


def test_splits_cover_all_tokens_in_whole_tiles(rng: np.random.Generator) -> None:
    for _ in range(200):
        work = tuple(
            (int(rng.integers(1, 60_000)), int(rng.integers(1, 300)))
            for _ in range(rng.integers(1, 12))
        )
        most = int(rng.integers(1, 17))
        size = split_size(work, QWEN3, most=most, shortest=SPLIT_STEP)
        assert size % SPLIT_STEP == 0
        assert size * most >= max(tokens for tokens, _ in work)


def test_the_device_plans_what_the_host_would(rng: np.random.Generator) -> None:
    for tiles in (QWEN3, QWEN15, tiling(6, 2, 20)):
        for _ in range(8):
            count = int(rng.integers(1, 40))
            query_lens = rng.integers(0, 80, count).tolist()
            computed = rng.integers(0, 10 ** rng.integers(1, 5), count)
            lengths = (computed + query_lens).tolist()
            query_lens[-1], lengths[-1] = 30, 0  # padding
            table = planned(query_lens, lengths, tiles)
            size = table[-1]
            assert table == split_table(query_lens, lengths, size, tiles.queries)
            assert size % SPLIT_STEP == 0
            assert table[2 * count + 1] <= LIMITS.partials
            work = tuple(
                (length, queries)
                for length, queries in zip(lengths, query_lens, strict=True)
                if 2 <= queries <= 64 and length
            )
            if work:
                best = split_size(work, tiles, most=16, shortest=512)
                partials = split_table(query_lens, lengths, best, tiles.queries)[2 * count + 1]
                if partials <= LIMITS.partials:
                    found, least = cost(size, work, tiles), cost(best, work, tiles)
                    assert found == pytest.approx(least, rel=1e-5)


def test_partial_results_never_exceed_their_buffer() -> None:
    few = Limits(queries=64, splits=16, shortest=128, partials=200)
    query_lens, lengths = [64, 64, 40], [30_000, 9000, 100]
    table = planned(query_lens, lengths, QWEN3, few)
    assert table == split_table(query_lens, lengths, table[-1], QWEN3.queries)
    assert table[2 * 3 + 1] <= 200
    none = Limits(queries=64, splits=16, shortest=128, partials=100)
    assert planned(query_lens, lengths, QWEN3, none)[-1] >= 30_000


def test_a_step_without_short_chunks_has_no_pieces() -> None:
    for query_lens, lengths in (([1, 0, 65], [9, 0, 70]), ([1], [5]), ([30], [0])):
        table = planned(query_lens, lengths, QWEN3)
        assert table[-1] > 0
        assert not any(table[:-1])


def test_splits_before_a_window_are_nobodys() -> None:
    window = 1000
    table = planned([64, 64], [40_000, 500], QWEN3, visibility=Window(window))
    size = table[-1]
    assert size < window, "it is what the window sees that is split"
    first = (40_000 - 63 - window) // size
    parts = -(-40_000 // size) - first
    assert table[:3] == [0, 4 * parts, 4 * (parts + 1)]
    assert table[3:6] == [0, 64 * parts, 64 * parts]
    assert table[6:9] == [0, 64, 64]
    assert parts <= LIMITS.splits


def test_a_batch_is_planned_once_for_all_its_layers() -> None:
    batch = replace(batch_of([64], [5000]), plan=DevicePlan())
    first = short_plan_of(batch, QWEN3, FULL, LIMITS)
    assert short_plan_of(batch, QWEN3, FULL, LIMITS) is first
    assert short_plan_of(batch, QWEN15, FULL, LIMITS) is not first
    assert short_plan_of(batch, QWEN3, Window(1000), LIMITS) is not first
