"""Which rows of a step read shared blocks once, and when that is not worth it."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from octavo.formats import kv_format
from octavo.kernels.inputs import SharedPrefix
from octavo.kv_cache.spec import KVGroup, attention_kv, group_layers
from octavo.visibility import Full, Window
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention.shared import MIN_BLOCKS  # isort: skip
from octavo.kernels.triton.attention.splits import tiling  # isort: skip
from octavo.runner.shared_prefix import PrefixPlanner, plan_prefix  # isort: skip

BLOCK = 16


def group(window: int | None = None) -> KVGroup:
    sees = Full() if window is None else Window(window)
    spec = attention_kv(1, 8, kv_format("float32"), visibility=sees)
    (found,) = group_layers((spec, spec))
    return found


def table(*shared: tuple[int, int], columns: int = 3 * MIN_BLOCKS) -> np.ndarray:
    """One row for each (prefix id, blocks of it); all other blocks are a row's own."""
    rows = np.arange(len(shared) * columns, dtype=np.int32).reshape(len(shared), columns) + 10_000
    for row, (prefix, blocks) in zip(rows, shared, strict=True):
        row[:blocks] = 1000 * prefix + np.arange(blocks)
    return rows


def plan(
    blocks: np.ndarray,
    lens: list[int] | None = None,
    query_lens: list[int] | None = None,
    *,
    of: KVGroup | None = None,
    **more: Any,
) -> SharedPrefix | None:
    rows = len(blocks)
    lens = lens or [blocks.shape[1] * BLOCK - 3] * rows
    options: dict[str, Any] = {
        "block_size": BLOCK,
        "min_saved_bytes": 0,
        **more,
    }
    found = plan_prefix(
        of or group(),
        blocks,
        np.array(lens, np.int32),
        np.array(query_lens or [1] * rows, np.int32),
        tiling(1, 1, 132),
        **(options | more),
    )
    return None if found is None else found.to_device(torch.device(DEVICE))


def groups_of(found: SharedPrefix | None) -> list[tuple[set[int], int]]:
    """Members and shared tokens of each group."""
    assert found is not None
    starts, members = found.group_starts.tolist(), found.members.tolist()
    shared = found.shared_tokens_S.tolist()
    parts = [members[a:b] for a, b in pairwise(starts)]
    assert len(parts) == found.num_groups
    assert [s for s, tokens in enumerate(shared) if tokens] == sorted(members)
    for part in parts:
        assert len({shared[s] for s in part}) == 1
    return [(set(part), shared[part[0]]) for part in parts]


def test_rows_with_equal_leading_blocks_are_groups_and_others_are_in_none() -> None:
    blocks = table((1, 100), (2, 90), (1, 100), (3, 5), (2, 90), (1, 100))
    found = groups_of(plan(blocks))
    assert sorted(found, key=lambda one: min(one[0])) == [
        ({0, 2, 5}, 100 * BLOCK),
        ({1, 4}, 90 * BLOCK),
    ]


def test_only_full_blocks_of_rows_with_one_token_count() -> None:
    blocks = table((1, 150), (1, 150), (1, 150))
    found = groups_of(plan(blocks, [120 * BLOCK - 1, 2000, 2000], [1, 1, 7]))
    assert found == [({0, 1}, 119 * BLOCK)]


def test_short_prefixes_short_rows_and_lone_rows_are_left_alone() -> None:
    assert plan(table((1, MIN_BLOCKS - 1), (1, MIN_BLOCKS - 1))) is None
    assert plan(table((1, MIN_BLOCKS), (1, MIN_BLOCKS))) is not None
    both = table((1, 150), (1, 150))
    assert plan(both, [MIN_BLOCKS * BLOCK - 1, 2400]) is None
    assert plan(both[:1]) is None
    assert plan(both, query_lens=[1, 2]) is None


def test_a_window_sees_too_little_of_a_prefix() -> None:
    assert plan(table((1, 150), (1, 150)), of=group(4096)) is None


def test_the_saved_reads_must_reach_the_threshold() -> None:
    blocks = table((1, 100), (1, 100), (1, 100))
    # Two of three rows read nothing of the prefix: K and V of one head of 8 float32, two layers.
    saved = 2 * 100 * BLOCK * (2 * 8 * 4) * 2
    assert plan(blocks, min_saved_bytes=saved) is not None
    assert plan(blocks, min_saved_bytes=saved + 1) is None


def planner(max_slots: int = 10**6) -> PrefixPlanner:
    tilings = [tiling(1, 1, 132)]
    return PrefixPlanner(
        [group()], tilings, block_size=BLOCK, min_saved_bytes=0, max_slots=max_slots
    )


def test_rows_that_go_on_share_what_they_shared_until_one_starts_or_goes() -> None:
    rng = random.Random(7)
    ones = np.ones(6, np.int32)
    for _ in range(50):
        blocks = table(*((rng.randint(1, 2), rng.randint(0, 130)) for _ in range(6)))
        lens = np.array([rng.randint(131 * BLOCK, 140 * BLOCK) for _ in range(6)], np.int32)
        running, rows = planner(), np.arange(6, dtype=np.int32)
        for step in range(4):
            (found,) = running.plan(blocks[None], rows, lens + 97 * step, ones)
            (fresh,) = planner().plan(blocks[None], rows, lens + 97 * step, ones)
            assert (found is None) == (fresh is None)
            if found is not None and fresh is not None:
                assert found.bounds == fresh.bounds
                for one, other in zip(found.arrays, fresh.arrays, strict=True):
                    np.testing.assert_array_equal(one, other)
        some, (left,) = rows[1:], running.plan(blocks[None], rows[1:], lens[1:], ones[1:])
        (fresh,) = planner().plan(blocks[None], some, lens[1:], ones[1:])
        assert (left is None) == (fresh is None)


def test_a_row_that_starts_anew_is_looked_at_again() -> None:
    blocks, rows, ones = (
        table((1, 100), (1, 100)),
        np.arange(2, dtype=np.int32),
        np.ones(2, np.int32),
    )
    lens, running = np.array([2000, 2000], np.int32), planner()
    assert running.plan(blocks[None], rows, lens, ones) != [None]
    blocks[1] += 5000
    running.forget()
    assert running.plan(blocks[None], rows, lens, ones) == [None]


def test_more_partial_results_than_there_is_room_for_are_not_planned() -> None:
    blocks, rows, ones = (
        table((1, 100), (1, 100)),
        np.arange(2, dtype=np.int32),
        np.ones(2, np.int32),
    )
    short, long = np.array([1700, 1700], np.int32), np.array([1700, 60000], np.int32)
    (plan,) = planner().plan(blocks[None], rows, short, ones)
    assert plan is not None
    running = planner(max_slots=2 * plan.max_slots)
    assert running.plan(blocks[None], rows, short, ones) != [None]
    assert running.plan(blocks[None], rows, long, ones) == [None]
