"""Sums over ranks by a kernel that writes into the other ranks' memory, where that can be.

Made by the Triton back end for each rank (`over_peers`), in place of the collectives that the
engine made; those do what is left. All ranks choose alike: by shapes alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.errors import EngineDeadError
from octavo.kernels.facts import PEER_BYTES
from octavo.kernels.triton.launching.building import is_building
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.peers.rows import sum_row_kernel
from octavo.kernels.triton.small.norm import MAX_COLUMNS
from octavo.parallel import Collectives, PeerMemory, UnreachableError

logger = logging.getLogger(__name__)

UNGATED_ROWS = 256
"""Up to here programs look at all words of a row until they are there (see `rows.py`)."""
PUSHED_BYTES = 2 << 20
"""That a rank sends for a sum among more than two ranks. Beyond it the collectives send less: there
every rank need not hear of all the others' rows. Two ranks send each row once either way."""
WAIT_TRIES, CHECK_TRIES = 100_000_000, 5_000_000
"""How often a program looks for another rank's words before it gives up: a look takes half a
microsecond or more. The latter at start."""
EMPTY = {torch.int16: -(1 << 15), torch.int32: -(1 << 31)}
"""The bits of -0.0, which nobody sends."""


class PeerSums(Collectives):
    """Collectives whose sums of rows [T, M] are one kernel; see `octavo.parallel.Collectives`."""

    def __init__(
        self,
        base: Collectives,
        memory: PeerMemory,
        columns: int,
        dtype: torch.dtype,
    ) -> None:
        """For rows of M `columns` in `dtype`. Returns when every rank's memory is ready."""
        self.rank, self.size = base.rank, base.size
        self._base = base
        self._stop = memory.stop
        self._keeper = memory
        self._columns = columns
        self.dtype = dtype
        self.ungated_rows = UNGATED_ROWS
        self.tries = CHECK_TRIES
        others = self.size - 1
        self.max_rows = len(memory.buffers[0]) // (2 * others * columns * dtype.itemsize)
        assert self.max_rows > 0
        pushed = PUSHED_BYTES // (others * columns * dtype.itemsize)
        self._most_rows = pushed if others > 1 else None
        num_bytes = 2 * others * self.max_rows * columns * dtype.itemsize
        word = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._words = tuple(buffer[:num_bytes].view(word) for buffer in memory.buffers)
        own = self._words[self.rank]
        own.fill_(EMPTY[word])
        self._turns = torch.zeros(self.max_rows + 1, dtype=torch.int32, device=own.device)
        base.least([int(own[-1])])  # all ranks have emptied theirs

    @property
    def takes_parts(self) -> bool:
        return self._most_rows is None  # else the collectives are asked for sums of many rows

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.numel() == 0 or x.numel() % self._columns:
            return self._base.all_reduce(x)
        rows = x.view(-1, self._columns)
        if not self.holds(len(rows)):
            return self._base.all_reduce(x)
        return self._sums(rows, None, None, 0.0).view(x.shape)

    def add_rms_norm(
        self,
        x_TM: Tensor,
        residual_TM: Tensor,
        weight_M: Tensor,
        eps: float,
        ids_TK: Tensor | None = None,
    ) -> Tensor | None:
        num_rows, columns = residual_TM.shape
        is_held = num_rows > 0 and self.holds(num_rows) and columns <= MAX_COLUMNS
        if not is_held or x_TM.dtype != self.dtype or columns != self._columns:
            return None
        return self._sums(x_TM, residual_TM, weight_M, eps, ids_TK)

    def all_gather_columns(self, x: Tensor) -> Tensor:
        return self._base.all_gather_columns(x)

    def least(self, values: Sequence[int]) -> list[int]:
        return self._base.least(values)

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        return self._base.peer_memory(num_bytes, device)

    def check(self) -> None:
        if int(self._stop[0]):
            raise EngineDeadError(
                f"rank {self.rank} of {self.size} waited in vain for another rank's part of a sum"
            )

    def abort(self) -> None:
        self._stop.fill_(1)
        self._base.abort()

    def holds(self, num_rows: int) -> bool:
        """Whether a sum of so many rows goes through the ranks' memory."""
        return self._most_rows is None or num_rows <= self._most_rows

    def _sums(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Returns the sums of x [T, M] or parts [T, S, M], or the norms of residual += sums."""
        assert x.stride(-1) == 1
        assert x.ndim == 2 or x.is_contiguous()
        assert ids is None or (ids.is_contiguous() and ids.dtype == torch.int32)
        is_plain = residual is None and x.is_contiguous() and x.ndim == 2
        out = x if is_plain else x.new_empty((len(x), self._columns))
        for first in range(0, len(x), self.max_rows):
            rows = slice(first, first + self.max_rows)
            part = None if residual is None else residual[rows]
            held = None if ids is None else ids[rows]
            self._launch(x[rows], held, part, weight, eps, out[rows])
        return out

    def _launch(
        self,
        x: Tensor,
        ids: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        out: Tensor,
    ) -> None:
        has_norm = residual is not None and weight is not None
        added, norm = (residual, weight) if has_norm else (x, x)
        assert added is not None
        assert added.stride(-1) == 1
        block = next_power_of_2(self._columns)
        sum_row_kernel[(len(x),)](
            self._stop,
            x,
            self._turns if ids is None else ids,
            added,
            norm,
            out,
            self._words,
            self._turns,
            self._columns,
            x.stride(0),
            added.stride(0),
            eps,
            self.max_rows,
            self.tries,
            RANK=self.rank,
            SIZE=self.size,
            PARTS=x.shape[1] if x.ndim > 2 else 1,
            TOP_K=0 if ids is None else ids.shape[1],
            NORM=has_norm,
            GATED=len(x) > self.ungated_rows,
            EMPTY=EMPTY[self._words[0].dtype],
            BLOCK=block,
            # As `small.norm`: a row's norm has one order.
            num_warps=max(1, min(16, block // 512)),
            **launch_options(x.device),
        )


def over_peers(
    base: Collectives,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Collectives:
    """Returns collectives that sum rows of so many `columns` through the ranks' memory; `base`,
    where that cannot be reached or a sum at start is wrong. All ranks return the same kind, and one
    logs which."""
    memory, reason = None, ""
    try:
        memory = base.peer_memory(PEER_BYTES, device)
    except UnreachableError as error:
        reason = str(error)
    sums = None
    if base.least([memory is not None])[0] and memory is not None:
        sums = PeerSums(base, memory, columns, dtype)
        reason = _fault(sums, device)
    is_right = bool(base.least([not reason])[0])
    if base.rank == 0 and is_right:
        logger.info("sums over ranks are made in the memory of %d GPUs", base.size)
    elif base.rank == 0 or reason:
        logger.warning("sums over ranks are the library's: %s", reason or "another rank cannot")
    if sums is None or not is_right:
        return base
    sums.tries = WAIT_TRIES
    return sums


def _fault(sums: PeerSums, device: torch.device) -> str:
    """Returns what is wrong with sums of few rows and of more, each made three times: of numbers
    whose sums every format holds."""
    assert not is_building()
    columns, dtype, size = sums._columns, sums.dtype, sums.size
    generator = torch.Generator().manual_seed(0)
    for count in [1, 4, sums.ungated_rows + 3] * 3:
        parts = torch.randint(-8, 9, (size, count, columns), generator=generator).to(dtype)
        found = sums.all_reduce(parts[sums.rank].to(device, copy=True)).cpu()
        if int(sums._stop[0]):
            return "another rank's part of a sum did not come"
        if not torch.equal(found, parts.sum(0)):
            return f"a sum of {count} rows over the memory of {size} GPUs was wrong"
    return ""
