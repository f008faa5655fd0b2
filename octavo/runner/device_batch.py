"""Block tables on the device, and the inputs of one step as tensors there.

Owned by a device's forward pass, on top of the host's `InputBatch`. Of the tables only deltas
travel, all in one pinned copy, and the step's own arrays in another; sampled tokens never leave the
device on their way to the next step.

Shape legend: S rows, T tokens, G KV groups; a step of a captured graph is padded to a `StepShape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import StepAttention
from octavo.kv_cache.planner import MemoryPlan
from octavo.runner.graphs import StepShape
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.transfer import Transfer, pack
from octavo.step import StepPlan, TableDelta

QUERY_STARTS, SOURCES, SLOTS = 1, 4, 6
"""Places among the arrays of a step; the slots of all KV groups come last."""
PER_ROW = (0, 1, 2)
"""The others have an entry for every token."""
_LONG_SPAN = 64
"""Blocks of one row from which on they are written as one piece."""
NUM_PER_TOKEN, NUM_PER_ROW = SLOTS - len(PER_ROW), 16
"""Numbers of each token, beside its slots; of each row, with room for what attention plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInputs:
    """One step's inputs on the device. `batches` has one entry per KV group."""

    token_ids_T: Tensor
    batches: tuple[AttentionBatch, ...]
    num_live: Tensor | None = None
    """int32 [1]: tokens from here on are padding."""


class DeviceBatch:
    """The device's side of the persistent rows."""

    def __init__(
        self, host: InputBatch, last_sampled: Tensor, device: torch.device, transfer: Transfer
    ) -> None:
        self.host = host
        self._last_sampled = last_sampled
        self._device = device
        self._transfer = transfer
        self._tables = torch.zeros(host.tables.shape, dtype=torch.int32, device=device)
        self._padded: dict[StepShape, tuple[Tensor, list[slice]]] = {}

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        """Writes new blocks into the host's tables and the device's."""
        others = [delta for delta in deltas if not self._apply_span(delta)]
        if not others:
            return
        _, max_rows, max_columns = self.host.tables.shape
        places: list[NDArray] = []
        for delta in others:
            self.host.apply(delta)
            rows = delta.group * max_rows + delta.rows.astype(np.int64)
            places.append(rows * max_columns + delta.columns)
        # Read back: a place that two deltas name must not depend on the order of two writes.
        place = np.concatenate(places)
        packed, (where, what) = pack((place, self.host.tables.reshape(-1)[place]))
        there = self._transfer.upload(packed)
        self._tables.view(-1).index_put_((there[where].long(),), there[what])

    def _apply_span(self, delta: TableDelta) -> bool:
        """Writes many blocks that follow each other in one row (a long prompt's) in one piece, if
        `delta` is that; returns whether it is."""
        count = len(delta.rows)
        if count < _LONG_SPAN:
            return False
        row, first = delta.rows.item(0), delta.columns.item(0)
        last = first + count - 1
        if delta.rows.item(-1) != row or delta.columns.item(-1) != last:
            return False
        if (delta.rows != row).any() or (np.diff(delta.columns) != 1).any():
            return False
        span = delta.group, row, slice(first, last + 1)
        self.host.tables[span] = delta.block_ids
        self._tables[span].copy_(self._transfer.upload(delta.block_ids))
        return True

    def inputs(self, plan: StepPlan, inputs: StepInputs, attention: StepAttention) -> DeviceInputs:
        """Returns the inputs of a step as they are."""
        packed, places = pack([*self._arrays(plan, inputs), *attention.arrays])
        return self._unpack(self._transfer.upload(packed), places, attention)

    def fill_padded(
        self, plan: StepPlan, inputs: StepInputs, attention: StepAttention, shape: StepShape
    ) -> None:
        """Copies a step, padded to `shape`, to where `padded_inputs` of that shape reads;
        `attention` is that of the padded step."""
        live, num_padded = plan.num_rows, shape.num_rows - plan.num_rows
        arrays = self._arrays(plan, inputs)
        for index, array in enumerate(arrays):
            more = num_padded if index in PER_ROW else shape.num_tokens - plan.num_tokens
            arrays[index] = _padded(array, more)
        # Padded rows have a query each while there are any, the last one has the rest.
        queries = arrays[QUERY_STARTS]
        queries[live:] = np.minimum(plan.num_tokens + np.arange(num_padded + 1), shape.num_tokens)
        queries[-1] = shape.num_tokens
        for array in (arrays[SOURCES], *arrays[SLOTS:]):
            array[plan.num_tokens :] = -1
        num_live = np.array([plan.num_tokens], np.int32)
        packed, places = pack([*arrays, *attention.arrays, num_live])
        if shape not in self._padded:
            there = torch.zeros(len(packed), dtype=torch.int32, device=self._device)
            self._padded[shape] = there, places
        self._padded[shape][0].copy_(self._transfer.upload(packed))

    def padded_inputs(self, attention: StepAttention, shape: StepShape) -> DeviceInputs:
        """Returns the inputs of a step of `shape`, made of what was last filled in; of `attention`
        only the bounds matter."""
        there, (*places, live) = self._padded[shape]
        return replace(self._unpack(there, places, attention), num_live=there[live])

    def _arrays(self, plan: StepPlan, inputs: StepInputs) -> list[NDArray]:
        sources = np.full(plan.num_tokens, -1, np.int32)
        sources[inputs.query_starts[:-1][plan.from_device]] = plan.rows[plan.from_device]
        return [
            plan.rows,
            inputs.query_starts,
            inputs.seq_lens_S,
            plan.token_ids,
            sources,
            inputs.positions_T,
            *inputs.slots,
        ]

    def _unpack(
        self, there: Tensor, places: Sequence[slice], attention: StepAttention
    ) -> DeviceInputs:
        rows, query_starts, seq_lens, token_ids, sources, positions, *rest = (
            there[place] for place in places
        )
        num_groups = len(self._tables)
        batches = [
            AttentionBatch(
                positions_T=positions,
                slot_mapping_T=slots,
                query_starts=query_starts,
                seq_lens_S=seq_lens,
                block_table=table.index_select(0, rows),
            )
            for table, slots in zip(self._tables, rest[:num_groups], strict=True)
        ]
        sampled = self._last_sampled[sources.clamp(min=0)]
        return DeviceInputs(
            token_ids_T=torch.where(sources < 0, token_ids, sampled),
            batches=attention.on_device(batches, rest[num_groups:]),
        )


def largest_upload(plan: MemoryPlan) -> int:
    """Returns about how many numbers the largest step uploads at once."""
    per_token, per_row = NUM_PER_TOKEN + len(plan.groups), NUM_PER_ROW
    numbers = per_token * plan.max_num_batched_tokens + per_row * plan.max_num_seqs
    return numbers + 64  # each array begins at a multiple of four


def _padded(array: NDArray, more: int) -> NDArray:
    """Returns the array with `more` zeros behind it. np.pad takes some 15 us for that."""
    padded = np.zeros(len(array) + more, array.dtype)
    padded[: len(array)] = array
    return padded
