"""A plan too large for the device's memory falls into parts that compute the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from octavo.runner.split import SMALLEST_CHUNK, split_plan
from octavo.step import PageCopy, StepPlan, token_purposes


def make_plan(query_lens: list[int]) -> StepPlan:
    lens = np.array(query_lens, np.int32)
    rows = np.arange(len(lens), dtype=np.int32)[::-1].copy()
    return StepPlan(
        step_id=7,
        rows=rows,
        starts=rows * 10,
        query_lens=lens,
        token_ids=np.arange(lens.sum(), dtype=np.int32),
        from_device=lens == 1,
        purposes=token_purposes(rows % 2 == 0),
        freed_rows=(3,),
        copies=(PageCopy(0, 1, 2),),
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_parts_hold_every_token_once_in_order(query_lens: list[int]) -> None:
    plan = make_plan(query_lens)
    parts = split_plan(plan)
    if parts is None:
        assert plan.num_rows == 1
        assert plan.num_tokens < 2 * SMALLEST_CHUNK
        return
    assert all(part.num_tokens == part.query_lens.sum() > 0 for part in parts)
    assert np.concatenate([part.token_ids for part in parts]).tolist() == plan.token_ids.tolist()
    assert not any(part.freed_rows or part.copies for part in parts)
    samples = [row for part in parts for row in part.rows[part.samples]]
    assert samples == plan.rows[plan.samples].tolist()
    if plan.num_rows == 1:
        first, second = parts
        assert second.starts[0] == first.starts[0] + first.query_lens[0]
        assert not first.samples[0]
    else:
        assert [row for part in parts for row in part.rows] == plan.rows.tolist()
        assert max(part.num_tokens for part in parts) < plan.num_tokens
