"""A runner's equipment on a GPU: nothing waits for the device, and small steps are replayed.

Put together by the builder. A small step is padded to a shape, copied to where the graph of that
shape reads and replayed; all others are launched kernel by kernel. Sampled tokens never leave the
device on their way to the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.kernels.planning import AttentionPlanner, StepAttention
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.device_batch import DeviceBatch, DeviceInputs
from octavo.runner.equipment import Equipment, RowSampler
from octavo.runner.expert_counts import ExpertCounts
from octavo.runner.graphs import StepGraphs, StepShape
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.lane import make_lane
from octavo.runner.step_sizes import StepSizes
from octavo.runner.transfer import Transfer
from octavo.step import MAX_PADDED_TOKENS, StepPlan, TableDelta

COUNTS_PERIOD = 64
"""Steps between two readings of how many tokens went to each expert; so is the last of a run."""


class DeviceForward:
    """Launches steps: as graphs where they fit one."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        batch: DeviceBatch,
        graphs: StepGraphs,
        counts_LE: Tensor,
        max_padded_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._storage = storage
        self._batch = batch
        self._graphs = graphs
        self._sizes = StepSizes(batch.host.max_num_seqs, max_padded_tokens)
        self._counts_LE = counts_LE

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        self._batch.apply(deltas)

    def run(self, plan: StepPlan, inputs: StepInputs, attention: StepAttention) -> Tensor:
        size = self._sizes.padded(plan)
        padded = size and attention.padded(*size)
        if size is None or padded is None:
            return self._launch(self._batch.inputs(plan, inputs, attention))
        rows, tokens = size
        shape = StepShape(
            num_rows=rows,
            num_tokens=tokens,
            is_decode=plan.num_rows == plan.num_tokens,
            bounds=padded.bounds,
        )
        self._batch.fill_padded(plan, inputs, padded, shape)
        body = lambda: self._launch(self._batch.padded_inputs(padded, shape))
        return self._graphs.run(shape, body)

    def _launch(self, inputs: DeviceInputs) -> Tensor:
        return self._decoder.forward(
            inputs.token_ids_T, inputs.batches, self._storage, self._counts_LE, inputs.num_live
        )


def device_equipment(
    decoder: Decoder,
    storage: KVStorage,
    planner: AttentionPlanner,
    sampler: RowSampler,
    graphs: StepGraphs,
    transfer: Transfer,
    max_model_len: int,
    max_padded_tokens: int = MAX_PADDED_TOKENS,
) -> Equipment:
    """Returns what a runner needs on the device of `storage`, for as many rows as `sampler` has."""
    device = storage.arena.device
    batch = InputBatch(
        max_num_seqs=len(sampler.last_sampled),
        max_model_len=max_model_len,
        block_size=storage.block_size,
        num_groups=len(storage.groups),
    )
    there = DeviceBatch(batch, sampler.last_sampled, device, transfer)
    counts = ExpertCounts(decoder.spec, device, transfer, period=COUNTS_PERIOD)
    return Equipment(
        lane=make_lane(device),
        transfer=transfer,
        batch=batch,
        planner=planner,
        forward=DeviceForward(decoder, storage, there, graphs, counts.counts_LE, max_padded_tokens),
        sampler=sampler,
        counts=counts,
    )
