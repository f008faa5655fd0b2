"""Chunks whose shared keys are multiplied out once a group: what is planned, against float64.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import KVLayer
from octavo.kernels.planning import PlanLimits, PlannedGroup
from octavo.visibility import Full
from tests.kernels.cases import floats
from tests.kernels.latent_cases import (
    HEADS,
    NOPE,
    RANK,
    ROPE,
    P,
    PagedLatents,
    expected_of,
    make_latents,
    make_op,
)
from tests.kernels.triton.cases import TOLERANCES, assert_near, make_ops
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention import plan, prompts  # isort: skip
from octavo.kernels.triton.latent import expand  # isort: skip
from tests.kernels.triton.attention.steps import step_of  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHARED = 3 * P
GROUP = PlannedGroup(
    num_heads=HEADS,
    num_kv_heads=1,
    is_latent=True,
    expanding_queries=2,
    visibility=Full(),
    token_bytes=4 * (RANK + ROPE),
    block_size=P,
)


@pytest.fixture(autouse=True)
def _whatever_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MIN_SAVED_PAIRS", 1)
    monkeypatch.setattr(prompts, "MIN_SHARED_BLOCKS", 2)


def two_groups(rng: np.random.Generator, lengths: list[int]) -> PagedLatents:
    """Sequences on one prefix, but for 2 and 5, which share another, and the last, which has all of
    its blocks to itself."""
    more = SHARED + 6 * P
    paged = make_latents(rng, [*lengths, more], RANK + ROPE, shared=SHARED, device=DEVICE)
    spare = paged.table[-1, 3:9]
    paged.table, paged.tokens = paged.table[:-1], paged.tokens[:-1]
    other = floats(rng, 2 * SHARED, RANK + ROPE)
    paged.pages_BPC[spare.long()] = other.view(6, P, -1).to(DEVICE)
    for s, blocks in ((2, slice(0, 3)), (5, slice(0, 3)), (len(lengths) - 1, slice(3, 6))):
        paged.table[s, :3] = spare[blocks]
        paged.tokens[s][:SHARED] = other[: 2 * SHARED].view(2, SHARED, -1)[blocks.start // 3]
    return paged


LIMITS = PlanLimits(max_num_seqs=8, max_model_len=256, kv_tokens=4096)


@pytest.mark.parametrize("size", [16_384, 64], ids=["one range", "ranges"])
def test_groups_chunks_of_their_own_and_decodes_in_one_step(
    rng: np.random.Generator, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand, "EXPANDED_TOKENS", size)
    monkeypatch.setattr(expand, "STEP", 16)
    lengths, query_lens = [70, 60, 90, 75, 33 + SHARED, 61, 50], [20, 12, 9, 1, 30, 13, 50]
    paged = two_groups(rng, lengths)
    batch = paged.batch(lengths, query_lens)
    step = plan.StepPlanner([GROUP], LIMITS, 132).plan(
        step_of(paged.table.numpy(), lengths, query_lens)
    )
    assert step.prompts is not None
    assert step.prompts.low.tolist() == [SHARED, SHARED, SHARED, 0, SHARED, SHARED, 0]
    first, second, *rest = step.prompts.run_groups.tolist()
    assert {first, second} == {0, 1}
    assert rest == [-1, first, second, -1]
    assert step.padded(16, 256) is None
    (batch,) = step.on_device([batch], [torch.from_numpy(a).to(DEVICE) for a in step.arrays])
    ops = make_ops(is_deterministic=False)
    op, kv_b = make_op(rng, ops, 256, DEVICE)
    wide = floats(rng, sum(query_lens), HEADS * (NOPE + ROPE) + RANK + ROPE)
    q_TN, latent_TC = wide.split([HEADS * (NOPE + ROPE), RANK + ROPE], dim=1)
    expected, _ = expected_of(q_TN.contiguous(), latent_TC, op, kv_b, paged, batch)
    moved = wide.to(DEVICE).split([HEADS * (NOPE + ROPE), RANK + ROPE], dim=1)
    found = ops.latent_attention(*moved, op, KVLayer(latent=paged.pages_BPC), batch)
    assert_near(found, expected, TOLERANCES[torch.float32])


def test_only_what_was_computed_before_the_step_is_shared(rng: np.random.Generator) -> None:
    lengths, query_lens = [SHARED + 8, SHARED + 24], [10, 24]
    table = make_latents(rng, lengths, 4, shared=SHARED).table.numpy()
    found = prompts.plan_prompts(GROUP, step_of(table, lengths, query_lens), table)
    assert found is not None
    assert found.low.tolist() == [SHARED - P] * 2


def test_chunks_that_share_too_little_stay_as_they_are(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, query_lens = [SHARED + 8, SHARED + 8], [8, 8]
    table = make_latents(rng, lengths, 4, shared=SHARED).table.numpy()
    rows = step_of(table, lengths, query_lens)
    pairs = 2 * 8 * (SHARED + 4)
    keys = SHARED + 2 * 8
    for queries, is_planned in ((pairs // keys - 1, True), (pairs // keys + 1, False), (0, False)):
        group = PlannedGroup(
            num_heads=HEADS,
            num_kv_heads=1,
            is_latent=True,
            expanding_queries=queries,
            visibility=Full(),
            token_bytes=4,
            block_size=P,
        )
        assert (prompts.plan_prompts(group, rows, table) is not None) == is_planned
    monkeypatch.setattr(prompts, "MIN_SAVED_PAIRS", pairs * HEADS)
    assert prompts.plan_prompts(GROUP, rows, table) is None


def test_a_deterministic_planner_and_several_kv_groups_plan_no_prompts(
    rng: np.random.Generator,
) -> None:
    lengths, query_lens = [SHARED + 8, SHARED + 8], [8, 8]
    table = make_latents(rng, lengths, 4, shared=SHARED).table.numpy()
    rows = step_of(table, lengths, query_lens)
    assert plan.StepPlanner([GROUP], LIMITS, 132).plan(rows).prompts is not None
    never = plan.StepPlanner([GROUP], LIMITS, 132, min_saved_bytes=None)
    assert never.plan(rows).prompts is None
    both = plan.StepPlanner([GROUP, GROUP], LIMITS, 132)
    assert both.plan(replace(rows, tables=(table, table))).prompts is None
