"""A plan becomes arrays: positions, slots, sampling rows and prompt targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from octavo.runner.input_batch import InputBatch
from octavo.step import Purpose, RowStart, StepPlan
from tests.runner.deltas import row_delta
from tests.runner.driver import GREEDY


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def start(row: int, prompt_len: int, *, prompt_logprobs: int | None = None) -> RowStart:
    return RowStart(
        row=row,
        params=replace(GREEDY, prompt_logprobs=prompt_logprobs),
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


def test_positions_slots_and_sampling_rows_follow_the_plan_and_the_tables_of_each_group() -> None:
    batch, plan = batch_of_two()
    inputs = batch.prepare(plan)
    assert inputs.positions_T.tolist() == [14, 15, 16, 17, 18, 33]
    first, second = inputs.slots
    assert first.tolist() == [9 * 16 + 14, 9 * 16 + 15, 64, 65, 66, 3 * 16 + 1]
    assert (second - first).tolist() == [160] * 6
    assert inputs.query_starts.tolist() == [0, 5, 6]
    assert inputs.seq_lens_S.tolist() == [19, 34]
    assert inputs.sampling_rows.tolist() == [0]
    assert inputs.last_tokens.tolist() == [5]
    assert inputs.output_indices.tolist() == [4]


def test_prompt_targets_end_with_the_prompt() -> None:
    batch, plan = batch_of_two()
    (targets,) = batch.prepare(plan).prompt_targets
    assert targets.token_ids.tolist() == [115, 116, 117, 118, 119]
    (last,) = batch.prepare(replace(plan, starts=int32(18, 33))).prompt_targets
    assert last.token_ids.tolist() == [119]
    assert batch.prepare(replace(plan, starts=int32(19, 33))).prompt_targets == ()


def test_a_row_that_was_freed_and_started_again_has_new_targets() -> None:
    batch, plan = batch_of_two()
    batch.free(2)
    batch.start(start(2, 20))
    assert batch.prepare(plan).prompt_targets == ()
