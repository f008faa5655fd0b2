"""Block tables on the device, and the inputs of one step as tensors there.

Owned by the device runner, on top of the host's `InputBatch`. Only deltas of the tables travel, in
the same copy as the step's own arrays; sampled tokens never leave the device on their way to the
next step.

Shape legend: S rows, T tokens, G KV groups; a step of a captured graph is padded to S = T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.ops import AttentionBatch, SharedPrefix
from octavo.kernels.triton.attention import SHORT_QUERIES
from octavo.kernels.triton.attention_decode import slot_counts
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.transfer import Transfer, pack
from octavo.step import Int32, StepPlan, TableDelta

QUERY_STARTS, SLOT_STARTS, SOURCES, SLOTS = 1, 3, 5, 7
"""Places among the arrays of a step; the slots of all KV groups come last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInputs:
    """One step's inputs on the device. `batches` has one entry per KV group."""

    token_ids_T: Tensor
    batches: tuple[AttentionBatch, ...]
    num_live: Tensor | None = None
    """int32 [1]: rows from here on are padding."""


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
        self._padded: dict[int, tuple[Tensor, list[slice]]] = {}

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        """Writes new blocks into the host's tables and the device's."""
        if not deltas:
            return
        _, max_rows, max_columns = self.host.tables.shape
        places: list[NDArray] = []
        for delta in deltas:
            self.host.apply(delta)
            first = (delta.group * max_rows + delta.row) * max_columns + delta.column
            places.append(np.arange(first, first + len(delta.block_ids)))
        # Read back: a place that two deltas name must not depend on the order of two writes.
        place = np.concatenate(places)
        packed, (where, what) = pack((place, self.host.tables.reshape(-1)[place]))
        there = self._transfer.upload(packed)
        self._tables.view(-1).index_put_((there[where].long(),), there[what])

    def inputs(
        self, plan: StepPlan, inputs: StepInputs, prefixes: Sequence[SharedPrefix | None]
    ) -> DeviceInputs:
        """Returns the inputs of a step as they are; `prefixes` has one entry per KV group."""
        arrays = self._arrays(plan, inputs)
        packed, places = pack(arrays)
        found = self._unpack(self._transfer.upload(packed), places)
        few = np.flatnonzero((plan.query_lens > 1) & (plan.query_lens <= SHORT_QUERIES))
        return replace(
            found,
            batches=tuple(
                replace(
                    batch,
                    max_query_len=int(plan.query_lens.max()),
                    max_seq_len=int(inputs.seq_lens_S.max()),
                    num_short_tokens=int(inputs.query_starts[few[-1] + 1]) if len(few) else 0,
                    max_slots=int(arrays[SLOT_STARTS][-1]),
                    prefix=prefix,
                )
                for batch, prefix in zip(found.batches, prefixes, strict=True)
            ),
        )

    def fill_padded(self, plan: StepPlan, inputs: StepInputs, size: int, max_slots: int) -> bool:
        """Copies a decode step, padded to `size` rows, to where `padded_inputs(size)` reads.

        Returns False, with nothing done, if its partial results do not fit into `max_slots`.
        """
        live, num_padded = plan.num_rows, size - plan.num_rows
        # Prefix sums go on by one a row: padding has a query, and room for a result of it.
        arrays = [np.pad(array, (0, num_padded)) for array in self._arrays(plan, inputs)]
        for sums in (arrays[QUERY_STARTS], arrays[SLOT_STARTS]):
            sums[live:] = sums[live] + np.arange(num_padded + 1)
        if arrays[SLOT_STARTS][-1] > max_slots:
            return False
        arrays[SOURCES][live:] = -1
        for array in arrays[SLOTS:]:
            array[live:] = -1
        packed, places = pack([*arrays, np.array([live])])
        if size not in self._padded:
            there = torch.zeros(len(packed), dtype=torch.int32, device=self._device)
            self._padded[size] = there, places
        self._padded[size][0].copy_(self._transfer.upload(packed))
        return True

    def padded_inputs(self, size: int, max_slots: int) -> DeviceInputs:
        """Returns the inputs of a decode step of `size` rows, made of what was last filled in."""
        there, places = self._padded[size]
        found = self._unpack(there, places[:-1])
        batches = tuple(
            replace(batch, max_query_len=1, max_slots=max_slots) for batch in found.batches
        )
        return replace(found, batches=batches, num_live=there[places[-1]])

    def _arrays(self, plan: StepPlan, inputs: StepInputs) -> list[Int32]:
        sources = np.full(plan.num_tokens, -1, np.int32)
        sources[inputs.query_starts[:-1][plan.from_device]] = plan.rows[plan.from_device]
        # Windows leave fewer partial results than no window.
        counts = np.where(plan.query_lens == 1, slot_counts(inputs.seq_lens_S, None), 0)
        return [
            plan.rows,
            inputs.query_starts,
            inputs.seq_lens_S,
            np.concatenate(([0], np.cumsum(counts))),
            plan.token_ids,
            sources,
            inputs.positions_T,
            *inputs.slots,
        ]

    def _unpack(self, there: Tensor, places: Sequence[slice]) -> DeviceInputs:
        rows, query_starts, seq_lens, slot_starts, token_ids, sources, positions, *slots = (
            there[place] for place in places
        )
        sampled = self._last_sampled[sources.clamp(min=0)]
        return DeviceInputs(
            token_ids_T=torch.where(sources < 0, token_ids, sampled),
            batches=tuple(
                AttentionBatch(
                    positions_T=positions,
                    slot_mapping_T=slot,
                    query_starts=query_starts,
                    seq_lens_S=seq_lens,
                    slot_starts_S=slot_starts,
                    block_table=table.index_select(0, rows),
                )
                for table, slot in zip(self._tables, slots, strict=True)
            ),
        )
