"""A runner's equipment where the host computes: nothing is uploaded, a thread of its own computes.

Put together by the builder. Inputs are the plan's arrays and views of the persistent rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.backend import StepRecorder
from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import AttentionPlanner, StepAttention
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.equipment import Equipment, RowSampler
from octavo.runner.expert_counts import ExpertCounts
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.lane import ThreadLane
from octavo.runner.recorded import RecordedDecodes
from octavo.runner.transfer import HostTransfer
from octavo.step import StepPlan, TableDelta


class HostForward:
    """Runs every step as it is."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        batch: InputBatch,
        last_sampled: Tensor,
        counts_LE: Tensor,
        recorder: StepRecorder | None = None,
    ) -> None:
        self._decoder = decoder
        self._storage = storage
        self._batch = batch
        self._last_sampled = last_sampled.numpy()
        self._counts_LE = counts_LE
        self._recorded: RecordedDecodes | None = None
        if recorder is not None and decoder.collectives.size == 1:
            columns = [table.shape[1] for table in batch.tables]
            self._recorded = RecordedDecodes(recorder, self._hidden, columns)

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        for delta in deltas:
            self._batch.apply(delta)

    def run(self, plan: StepPlan, inputs: StepInputs, attention: StepAttention) -> Tensor:
        token_ids = self.token_ids(plan, inputs)
        batches = self.attention_batches(plan, inputs, attention)
        if self._recorded is not None and self._recorded.takes(plan.num_rows, plan.num_tokens):
            self._decoder.progress.beat()
            return self._recorded.run(token_ids, batches)
        return self._hidden(token_ids, batches)

    def _hidden(self, token_ids: Tensor, batches: tuple[AttentionBatch, ...]) -> Tensor:
        return self._decoder.forward(token_ids, batches, self._storage, self._counts_LE)

    def token_ids(self, plan: StepPlan, inputs: StepInputs) -> Tensor:
        """Returns the input ids int32 [T], sampled ones filled in."""
        token_ids = plan.token_ids.copy()
        first = inputs.query_starts[:-1][plan.from_device]
        token_ids[first] = self._last_sampled[plan.rows[plan.from_device]]
        return torch.from_numpy(token_ids)

    def attention_batches(
        self, plan: StepPlan, inputs: StepInputs, attention: StepAttention
    ) -> tuple[AttentionBatch, ...]:
        """Returns where queries and KV lie, one batch per KV group."""
        num_columns = -(-int(inputs.seq_lens_S.max()) // self._batch.block_size)
        positions, starts, lens = map(
            torch.from_numpy, (inputs.positions_T, inputs.query_starts, inputs.seq_lens_S)
        )
        batches = [
            AttentionBatch(
                positions_T=positions,
                slot_mapping_T=torch.from_numpy(slots.astype(np.int64)),
                query_starts=starts,
                seq_lens_S=lens,
                block_table=torch.from_numpy(table[plan.rows, :num_columns]),
            )
            for table, slots in zip(self._batch.tables, inputs.slots, strict=True)
        ]
        return attention.on_device(batches, [torch.from_numpy(one) for one in attention.arrays])


def host_equipment(
    decoder: Decoder,
    storage: KVStorage,
    planner: AttentionPlanner,
    sampler: RowSampler,
    max_model_len: int,
    recorder: StepRecorder | None = None,
) -> Equipment:
    """Returns what a runner needs on the host, for as many rows as `sampler` has."""
    transfer = HostTransfer()
    batch = InputBatch(
        max_num_seqs=len(sampler.last_sampled),
        max_model_len=max_model_len,
        block_size=storage.block_size,
        num_groups=len(storage.groups),
    )
    # Read after every step: it costs nothing here.
    counts = ExpertCounts(decoder.spec, torch.device("cpu"), transfer, period=1)
    forward = HostForward(decoder, storage, batch, sampler.last_sampled, counts.counts_LE, recorder)
    return Equipment(
        lane=ThreadLane(),
        transfer=transfer,
        batch=batch,
        planner=planner,
        forward=forward,
        sampler=sampler,
        counts=counts,
    )
