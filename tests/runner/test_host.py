"""What the host's forward pass gives the decoder."""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.planning import Unplanned
from octavo.runner.host import HostForward
from octavo.runner.input_batch import InputBatch
from octavo.step import StepPlan
from tests.runner.two_rows import batch_of_two


def forward_of_two() -> tuple[HostForward, InputBatch, StepPlan]:
    nothing: Any = None
    batch, plan = batch_of_two()
    last_sampled = torch.tensor([77, 0, 88], dtype=torch.int32)
    return HostForward(nothing, nothing, batch, last_sampled, nothing), batch, plan


def test_batches_hold_the_tables_of_each_group_up_to_the_longest_sequence() -> None:
    forward, batch, plan = forward_of_two()
    first, second = forward.attention_batches(plan, batch.prepare(plan), Unplanned())
    assert first.positions_T.tolist() == [14, 15, 16, 17, 18, 33]
    assert first.slot_mapping_T.tolist() == [9 * 16 + 14, 9 * 16 + 15, 64, 65, 66, 3 * 16 + 1]
    assert first.slot_mapping_T.dtype == torch.int64
    assert first.block_table.tolist() == [[9, 4, 0], [1, 2, 3]]
    assert second.block_table.tolist() == [[19, 14, 0], [11, 12, 13]]


def test_a_token_from_the_device_is_the_one_the_row_sampled_last() -> None:
    forward, batch, plan = forward_of_two()
    token_ids = forward.token_ids(plan, batch.prepare(plan))
    assert token_ids.tolist() == [114, 115, 116, 117, 118, 77]
    assert plan.token_ids[-1] == 0
