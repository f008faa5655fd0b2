"""A step of two rows: a chunk of a prompt, and a decode."""

from __future__ import annotations

import numpy as np
from msgspec import structs

from octavo.runner.input_batch import InputBatch
from octavo.step import Purpose, RowStart, StepPlan
from tests.runner.deltas import row_delta
from tests.runner.driver import GREEDY


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def start(row: int, prompt_len: int, *, prompt_logprobs: int | None = None) -> RowStart:
    return RowStart(
        row=row,
        params=structs.replace(GREEDY, prompt_logprobs=prompt_logprobs),
        seed=0,
        stop_token_ids=(),
        prompt_len=prompt_len,
        token_ids=np.arange(100, 100 + prompt_len, dtype=np.int32),
    )


def batch_of_two() -> tuple[InputBatch, StepPlan]:
    """Row 2 computes positions 14..18 of a prompt of 20; row 0 decodes its token 33."""
    batch = InputBatch(max_num_seqs=3, max_model_len=64, block_size=16, num_groups=2)
    batch.start(start(2, 20, prompt_logprobs=1))
    batch.start(start(0, 30))
    for group in range(2):
        for row, blocks in ((2, (9, 4)), (0, (1, 2, 3))):
            ids = int32(*blocks) + 10 * group
            batch.apply(row_delta(group, row, 0, ids))
    plan = StepPlan(
        step_id=0,
        rows=int32(2, 0),
        starts=int32(14, 33),
        query_lens=int32(5, 1),
        token_ids=int32(114, 115, 116, 117, 118, 0),
        from_device=np.array([False, True]),
        purposes=np.array([Purpose.NONE, Purpose.TOKEN], np.int8),
    )
    return batch, plan
