"""What a step's attention is planned to be: bounds, partial results, and which rows read shared
blocks once, and when that is not worth it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import PlanLimits, PlannedGroup
from octavo.visibility import Chunk, Visibility, Window
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention.device_plan import DevicePlan, SharedPrefix  # isort: skip
from octavo.kernels.triton.attention.plan import plan_prefix  # isort: skip
from octavo.kernels.triton.attention.shared import MIN_BLOCKS  # isort: skip
from octavo.kernels.triton.attention.splits import tiling  # isort: skip
from tests.kernels.triton.attention.steps import (
    BLOCK,
    group,
    one_step,
    planner,
    step_of,
    table,
)


def plan(
    blocks: np.ndarray,
    lens: list[int] | None = None,
    query_lens: list[int] | None = None,
    *,
    of: PlannedGroup | None = None,
    min_saved_bytes: int = 0,
) -> SharedPrefix | None:
    rows = len(blocks)
    lens = lens or [blocks.shape[1] * BLOCK - 3] * rows
    step = step_of(blocks, lens, query_lens or [1] * rows)
    found = plan_prefix(of or group(), step, blocks, tiling(1, 1, 132), min_saved_bytes)
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


@pytest.mark.parametrize("visibility", [Window(4096), Chunk(8192)], ids=str)
def test_who_sees_a_part_sees_too_little_of_a_prefix(visibility: Visibility) -> None:
    assert plan(table((1, 150), (1, 150)), of=group(visibility)) is None


def test_the_saved_reads_must_reach_the_threshold() -> None:
    blocks = table((1, 100), (1, 100), (1, 100))
    # Two of three rows read nothing of the prefix: K and V of one head of 8 float32, two layers.
    saved = 2 * 100 * BLOCK * (2 * 8 * 4) * 2
    assert plan(blocks, min_saved_bytes=saved) is not None
    assert plan(blocks, min_saved_bytes=saved + 1) is None


def test_rows_that_go_on_share_what_they_shared_until_one_starts_or_goes() -> None:
    rng = random.Random(7)
    ones = np.ones(6, np.int32)
    for _ in range(50):
        blocks = table(*((rng.randint(1, 2), rng.randint(0, 130)) for _ in range(6)))
        lens = np.array([rng.randint(131 * BLOCK, 140 * BLOCK) for _ in range(6)], np.int32)
        running = planner()
        for count in range(4):
            step = step_of(blocks, lens + 97 * count, ones)
            (found,), (fresh,) = running.prefixes(step), planner().prefixes(step)
            assert (found is None) == (fresh is None)
            if found is not None and fresh is not None:
                assert found.bounds == fresh.bounds
                for one, other in zip(found.arrays, fresh.arrays, strict=True):
                    np.testing.assert_array_equal(one, other)
        rows = np.arange(1, 6, dtype=np.int32)
        step = step_of(blocks, lens[1:], ones[1:], rows=rows)
        (left,), (fresh,) = running.prefixes(step), planner().prefixes(step)
        assert (left is None) == (fresh is None)


def test_a_row_that_starts_anew_is_looked_at_again() -> None:
    blocks, lens = table((1, 100), (1, 100)), [2000, 2000]
    running = planner()
    assert running.prefixes(step_of(blocks, lens, [1, 1])) != [None]
    blocks[1] += 5000
    assert running.prefixes(step_of(blocks, lens, [1, 1], num_started=1)) == [None]


def test_more_partial_results_than_there_is_room_for_are_not_planned() -> None:
    blocks = table((1, 100), (1, 100))
    short, long = step_of(blocks, [1700, 1700], [1, 1]), step_of(blocks, [1700, 60_000], [1, 1])
    assert planner().prefixes(short) != [None]
    assert planner().prefixes(long) != [None]
    few = planner(PlanLimits(max_num_seqs=2, max_model_len=4000, kv_tokens=8000))
    assert few.prefixes(short) != [None]
    assert few.prefixes(long) == [None]


def test_bounds_of_a_step_hold_and_padding_keeps_its_partial_results() -> None:
    plan = one_step([200, 70, 1030, 3], [1, 64, 1, 3])
    assert (plan.max_query_len, plan.max_seq_len, plan.num_short_tokens) == (64, 1030, 69)
    starts = plan.partial_starts.tolist()
    assert starts[1] == starts[2]
    assert starts[3] == starts[4] == plan.max_partials
    padded = plan.padded(16, 128)
    assert padded is not None
    assert padded.partial_starts[:5].tolist() == starts
    assert np.diff(padded.partial_starts[4:]).tolist() == [1] * 12
    assert padded.partial_starts[-1] <= padded.max_partials
    assert (padded.max_query_len, padded.max_seq_len, padded.num_short_tokens) == (128, None, 128)
    decode = one_step([200, 1030], [1, 1]).padded(4, 4)
    assert decode is not None
    assert (decode.max_query_len, decode.num_short_tokens) == (1, 0)


def test_a_padded_step_whose_partial_results_find_no_room_is_not_padded() -> None:
    limits = PlanLimits(max_num_seqs=2, max_model_len=64, kv_tokens=64)
    step = step_of(table((1, 0), (2, 0)), [3000, 3000], [1, 1])
    assert planner(limits).plan(step).padded(2, 2) is None


def test_steps_that_share_nothing_replay_one_graph_whatever_their_lengths() -> None:
    plans = [one_step(lens, [1, 1]).padded(2, 2) for lens in ([5, 9], [3000, 1])]
    assert [plan and plan.bounds for plan in plans] == [None, None]
    first, second = ([len(array) for array in plan.arrays] for plan in plans if plan)
    assert first == second


def test_every_group_of_a_step_gets_the_plan_and_its_own_prefix() -> None:
    blocks = table((1, 100), (1, 100))
    step = replace(step_of(blocks, [2000, 2000], [1, 1]), tables=(blocks, blocks))
    plan = planner(of=(group(), group(Window(64)))).plan(step)
    tensors = [torch.from_numpy(array) for array in plan.arrays]
    one = torch.zeros(2, dtype=torch.int32)
    batch = AttentionBatch(
        positions_T=one, slot_mapping_T=one, query_starts=one, seq_lens_S=one, block_table=one[None]
    )
    first, second = plan.on_device((batch, batch), tensors)
    assert isinstance(first.plan, DevicePlan)
    assert isinstance(second.plan, DevicePlan)
    assert groups_of(first.plan.prefix) == [({0, 1}, 100 * BLOCK)]
    assert second.plan.prefix is None
    assert first.plan.partial_starts_S is second.plan.partial_starts_S
    assert plan.bounds is not None
