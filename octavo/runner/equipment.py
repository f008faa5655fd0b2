"""What a model runner works with: all that differs between a host and a device.

    host.py     a thread computes; inputs are views of NumPy arrays
    device.py   the caller's thread launches; inputs are uploaded, small steps replayed as graphs

Put together by the builder, used by the model runner, which asks nothing about which it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.kernels.planning import AttentionPlanner, StepAttention
from octavo.runner.expert_counts import ExpertCounts
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.lane import Lane
from octavo.runner.sampler import SampledTokens
from octavo.runner.transfer import Transfer
from octavo.step import Int32, RowStart, StepPlan, TableDelta, Words


class StepForward(Protocol):
    """Runs the decoder over a step's tokens."""

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        """Writes new blocks into the block tables."""
        ...

    def run(self, plan: StepPlan, inputs: StepInputs, attention: StepAttention) -> Tensor:
        """Returns hidden states [T or more, M] where the decoder is; those beyond T mean nothing.
        They are valid until the next step."""
        ...


class RowSampler(Protocol):
    """Chooses tokens where the logits are."""

    @property
    def last_sampled(self) -> Tensor:
        """int32 [max_num_seqs]: each row's last token, 0 where it was broken."""
        ...

    def start_row(self, start: RowStart) -> None: ...

    def free_row(self, row: int) -> None: ...

    def sample(
        self, logits_SV: Tensor, rows: Int32, output_indices: Int32, masks: Words | None = None
    ) -> SampledTokens: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """Of one runner."""

    lane: Lane
    transfer: Transfer
    batch: InputBatch
    planner: AttentionPlanner
    forward: StepForward
    sampler: RowSampler
    counts: ExpertCounts
