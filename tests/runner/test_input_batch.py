"""A plan becomes arrays: positions, slots, sampling rows and prompt targets."""

from __future__ import annotations

from dataclasses import replace

from tests.runner.two_rows import batch_of_two, int32, start


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
