"""Parts a step plan in two, for a device that has too little memory to run it at once.

Called by the model runner. Each part computes the same tokens, from the same KV, as the whole.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from octavo.step import StepPlan

SMALLEST_CHUNK = 32
"""Tokens of one row that are worth a step of their own."""


def split_plan(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    """Returns two plans, of half the rows or of half a row's tokens, or None if that is too little.

    What the plan says of starts, copies and tables has been done and is in neither part.
    """
    if plan.num_rows == 1:
        return _split_row(plan)
    ends = np.cumsum(plan.query_lens)
    middle = 1 + int(np.searchsorted(ends[:-1], plan.num_tokens / 2))
    middle = min(middle, plan.num_rows - 1)
    token = int(ends[middle - 1])
    return _part(plan, slice(0, middle), slice(0, token)), _part(
        plan, slice(middle, None), slice(token, None)
    )


def _part(plan: StepPlan, rows: slice, tokens: slice) -> StepPlan:
    return StepPlan(
        step_id=plan.step_id,
        rows=plan.rows[rows],
        starts=plan.starts[rows],
        query_lens=plan.query_lens[rows],
        token_ids=plan.token_ids[tokens],
        from_device=plan.from_device[rows],
        purposes=plan.purposes[rows],
        masked=None if plan.masked is None else plan.masked[rows],
    )


def _split_row(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    middle = plan.num_tokens // 2
    if middle < SMALLEST_CHUNK:
        return None
    first = _part(plan, slice(0, 1), slice(0, middle))
    second = _part(plan, slice(0, 1), slice(middle, None))
    lengths = np.array([middle], np.int32)
    return (
        replace(first, query_lens=lengths, purposes=np.zeros(1, np.int8), masked=None),
        replace(second, query_lens=plan.query_lens - lengths, starts=plan.starts + lengths),
    )
