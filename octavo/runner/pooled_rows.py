"""The hidden states that vectors are made of, gathered while a prompt is computed chunk by chunk.

Owned by a runner of a model with a pooler. What a row needs beside its last token is kept here by
row, until the row starts anew. It never decides which row wants a vector: the plan does.

Shape legend: T tokens of the step, S rows of the plan, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from octavo.models.decoder import Decoder
from octavo.models.pooling_spec import Reads
from octavo.step import Int32, Purpose, RowStart, StepPlan

_TILE = 64
"""Tokens that are added at once in float64."""

Upload = Callable[[Int32], Tensor]
"""Puts indices where the hidden states are."""


class PooledRows:
    """Partial means and first states of the sequences that want vectors."""

    def __init__(
        self, reads: Reads, max_num_seqs: int, hidden_size: int, device: torch.device
    ) -> None:
        self._reads = reads
        self._wants = np.zeros(max_num_seqs, np.bool_)
        self._num_counted = np.zeros(max_num_seqs, np.int64)
        """Tokens of each row that are in its sum: a step may be computed again in parts."""
        rows = 0 if reads == "last" else max_num_seqs
        self._kept = torch.zeros(rows, hidden_size, dtype=torch.float64, device=device)
        """[rows, M] sums of hidden states, or the first one."""

    @staticmethod
    def of(decoder: Decoder, max_num_seqs: int, device: torch.device) -> PooledRows | None:
        """Returns those of a model; None for one without a pooler."""
        pooler = decoder.pooler
        if pooler is None:
            return None
        return PooledRows(pooler.spec.reads, max_num_seqs, decoder.spec.hidden_size, device)

    def start(self, start: RowStart) -> None:
        """A sequence takes a row, whatever it held."""
        self._wants[start.row] = start.wants_vector
        self._num_counted[start.row] = 0

    def read(
        self, hidden_TM: Tensor, plan: StepPlan, query_starts: Int32, upload: Upload
    ) -> Tensor | None:
        """Takes a step's hidden states; returns float32 [rows for a vector, M], in their order;
        None if there is no such row. `query_starts` is [S + 1]."""
        if self._reads != "last":
            for place in np.flatnonzero(self._wants[plan.rows]).tolist():
                self._keep(hidden_TM, plan, place, int(query_starts[place]))
        wanted = np.flatnonzero(plan.purposes == Purpose.VECTOR)
        if not len(wanted):
            return None
        if self._reads == "last":
            return hidden_TM[upload(query_starts[1:][wanted] - 1)].float()
        states = self._kept[upload(plan.rows[wanted])]
        if self._reads == "mean":
            lens = (plan.starts + plan.query_lens)[wanted].tolist()
            states /= torch.tensor(lens, dtype=torch.float64, device=states.device)[:, None]
        return states.float()

    def _keep(self, hidden_TM: Tensor, plan: StepPlan, place: int, first: int) -> None:
        row, start = int(plan.rows[place]), int(plan.starts[place])
        end = start + int(plan.query_lens[place])
        counted = int(self._num_counted[row])
        if end <= counted:
            return
        assert start <= counted, "a vector of all hidden states needs them all computed"
        tokens_TM = hidden_TM[first + counted - start : first + end - start]
        kept_M = self._kept[row]
        if self._reads == "mean":
            self._kept[row] = _summed(kept_M if counted else torch.zeros_like(kept_M), tokens_TM)
        elif not counted:
            self._kept[row] = tokens_TM[0].double()
        self._num_counted[row] = end


def _summed(total_M: Tensor, tokens_TM: Tensor) -> Tensor:
    """Returns the sum, float64; on a CPU one token after the other, so that it does not depend on
    where chunks end."""
    for tile in tokens_TM.split(_TILE):
        total_M = torch.cat((total_M[None], tile.double())).cumsum(0)[-1]
    return total_M
