"""Steps whose rows share what a test says, and the plans that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from octavo.kernels.planning import PlanLimits, PlannedGroup, StepRows
from octavo.visibility import Full, Visibility
from tests.kernels.triton import interpreter  # noqa: F401

from octavo.kernels.triton.attention.plan import StepPlan, StepPlanner  # isort: skip
from octavo.kernels.triton.attention.shared import MIN_BLOCKS  # isort: skip

BLOCK = 16


def group(visibility: Visibility = Full()) -> PlannedGroup:
    """Two layers of one head of 8 float32."""
    return PlannedGroup(
        num_heads=1,
        num_kv_heads=1,
        visibility=visibility,
        token_bytes=2 * (2 * 8 * 4),
        block_size=BLOCK,
    )


def step_of(
    blocks: np.ndarray,
    lens: Sequence[int] | np.ndarray,
    query_lens: Sequence[int] | np.ndarray,
    *,
    rows: np.ndarray | None = None,
    num_started: int = 0,
) -> StepRows:
    """A step of all rows of the table, or of some."""
    return StepRows(
        rows=np.arange(len(blocks), dtype=np.int32) if rows is None else rows,
        query_lens=np.array(query_lens, np.int32),
        query_starts=np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32),
        seq_lens=np.array(lens, np.int32),
        tables=(blocks,),
        num_started=num_started,
    )


def table(*shared: tuple[int, int], columns: int = 3 * MIN_BLOCKS) -> np.ndarray:
    """One row for each (prefix id, blocks of it); all other blocks are a row's own."""
    rows = np.arange(len(shared) * columns, dtype=np.int32).reshape(len(shared), columns) + 10_000
    for row, (prefix, blocks) in zip(rows, shared, strict=True):
        row[:blocks] = 1000 * prefix + np.arange(blocks)
    return rows


LIMITS = PlanLimits(max_num_seqs=8, max_model_len=100_000, kv_tokens=800_000)


def planner(limits: PlanLimits = LIMITS, of: Sequence[PlannedGroup] = (group(),)) -> StepPlanner:
    return StepPlanner(of, limits, 132, min_saved_bytes=0)


def one_step(lens: Sequence[int], query_lens: Sequence[int], *, groups: int = 1) -> StepPlan:
    """The plan of rows that share nothing."""
    blocks = table(*((s, 0) for s in range(len(lens))))
    step = replace(step_of(blocks, lens, query_lens), tables=(blocks,) * groups)
    return planner(of=(group(),) * groups).plan(step)
