"""Sums over ranks by kernels that write into the other ranks' memory, and which of them makes one.

Made by the Triton back end for each rank (`over_peers`), in place of the collectives that the
engine made; those do what is left. All ranks choose alike: by shapes alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import EngineDeadError
from octavo.kernels.facts import PEER_BYTES
from octavo.kernels.triton.launching.building import is_building
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2, num_processors
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.peers.chunks import sum_chunks_kernel
from octavo.kernels.triton.peers.rows import sum_row_kernel
from octavo.kernels.triton.small.norm import MAX_COLUMNS
from octavo.parallel import Collectives, PeerMemory, UnreachableError

logger = logging.getLogger(__name__)

FEW_ROWS = 256
"""Up to here every word says by itself that it has come, beyond flags do: emptying what was read
costs as much as reading it."""
PUSHED_BYTES = 2 << 20
"""That a rank sends for a sum of few rows. Beyond it, among more than two ranks, the collectives
send less: there every rank need not hear of all the others' rows."""
WAIT_TRIES, CHECK_TRIES = 100_000_000, 5_000_000
"""How often a program looks for another rank's words before it gives up: a look takes half a
microsecond or more. The latter at start."""
EMPTY = {torch.int16: -(1 << 15), torch.int32: -(1 << 31)}
"""The bits of -0.0, which nobody sends."""
REGISTERS = 1 << 16
"""Of a multiprocessor."""
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksShape:
    """Of a launch for many rows."""

    rows: int = 4
    """Of a chunk."""
    ahead: int = 2
    """Chunks that a program sends before it waits for one."""
    programs: int = 2
    """On each multiprocessor: as many as are there at once."""
    num_warps: int = 8


CHUNKS = ChunksShape()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Places:
    """What lies in the ranks' memory: a tensor a rank, where not said otherwise."""

    words: tuple[Tensor, ...]
    """Integers [2, R - 1, few, M] that are EMPTY where nothing has come."""
    numbers: tuple[Tensor, ...]
    """[2, R - 1, many, M]."""
    flags: tuple[Tensor, ...]
    """int32 [R - 1, chunks of many]."""
    few: int
    many: int


def _places(
    memory: PeerMemory, columns: int, dtype: torch.dtype, few_rows: int, chunk_rows: int
) -> _Places:
    others = len(memory.buffers) - 1
    row_bytes = 2 * others * columns * dtype.itemsize
    few = min(few_rows, PUSHED_BYTES // (others * columns * dtype.itemsize))
    left = len(memory.buffers[0]) - few * row_bytes - 3 * _ALIGNMENT
    num_chunks = left // (chunk_rows * row_bytes + 4 * others) if others == 1 else 0
    many = chunk_rows * num_chunks

    def views(first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        last = first + count * dtype.itemsize
        return tuple(buffer[first:last].view(dtype) for buffer in memory.buffers)

    flags_at = _aligned(few * row_bytes)
    numbers_at = _aligned(flags_at + 4 * others * num_chunks)
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    return _Places(
        words=views(0, 2 * others * few * columns, word),
        numbers=views(numbers_at, 2 * others * many * columns, dtype),
        flags=views(flags_at, others * num_chunks, torch.int32),
        few=few,
        many=many,
    )


def _aligned(count: int) -> int:
    return cdiv(count, _ALIGNMENT) * _ALIGNMENT


class PeerSums:
    """Collectives whose sums of rows [T, M] are one kernel; see `octavo.parallel.Collectives`."""

    def __init__(
        self,
        base: Collectives,
        memory: PeerMemory,
        columns: int,
        dtype: torch.dtype,
        *,
        is_deterministic: bool,
        few_rows: int = FEW_ROWS,
        chunks: ChunksShape = CHUNKS,
    ) -> None:
        """For rows of M `columns` in `dtype`. Returns when every rank's memory is ready."""
        self.rank, self.size = base.rank, base.size
        self._base = base
        self._stop = memory.stop
        self._keeper = memory
        self._columns = columns
        self._dtype = dtype
        self._is_deterministic = is_deterministic
        self.tries = CHECK_TRIES
        self._places = places = _places(memory, columns, dtype, few_rows, chunks.rows)
        self._chunks = chunks
        own = places.words[self.rank]
        self._device = device = own.device
        self._row_turns = torch.zeros(places.few, dtype=torch.int32, device=device)
        num_chunks = places.many // chunks.rows
        self._chunk_turns = torch.zeros(num_chunks, dtype=torch.int32, device=device)
        own.fill_(EMPTY[own.dtype])
        places.flags[self.rank].zero_()
        programs = chunks.programs * num_processors(device)
        # The fill has ended, too, where this is read.
        self._programs, *_ = base.least([programs, int(own[-1])])

    @property
    def takes_parts(self) -> bool:
        # Only where sums of all sizes add them up alike.
        return self._places.many > 0 and not self._is_deterministic

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype or x.numel() == 0 or x.numel() % self._columns:
            return self._base.all_reduce(x)
        rows = x.view(-1, self._columns)
        if not self._holds(len(rows)):
            return self._base.all_reduce(x)
        return self._sums(rows, None, None, 0.0).view(x.shape)

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor | None:
        num_rows, columns = residual_TM.shape
        is_held = num_rows > 0 and self._holds(num_rows) and columns <= MAX_COLUMNS
        if not is_held or x_TM.dtype != self._dtype or columns != self._columns:
            return None
        if self._is_deterministic and num_rows > self._places.few:
            return None  # a norm of several rows adds up in another order
        return self._sums(x_TM, residual_TM, weight_M, eps)

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

    def _holds(self, num_rows: int) -> bool:
        return num_rows <= self._places.few or self._places.many > 0

    def _sums(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
    ) -> Tensor:
        """Returns the sums of x [T, M] or parts [T, S, M], or the norms of residual += sums."""
        assert x.stride(-1) == 1
        assert x.ndim == 2 or x.is_contiguous()
        is_plain = residual is None and x.is_contiguous() and x.ndim == 2
        out = x if is_plain else x.new_empty((len(x), self._columns))
        few, many = self._places.few, self._places.many
        step = few if len(x) <= few else many
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            part = None if residual is None else residual[rows]
            launch = self._few if len(x) <= few else self._many
            launch(x[rows], part, weight, eps, out[rows])
        return out

    def _few(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, out: Tensor
    ) -> None:
        words = self._places.words
        sum_row_kernel[(len(x),)](
            *self._rows(x, residual, weight, out),
            words,
            self._row_turns,
            *self._numbers(x, residual, eps),
            self._places.few,
            self.tries,
            **self._constants(x, residual),
            EMPTY=EMPTY[words[0].dtype],
            # As `small.norm`: a row's norm has one order.
            num_warps=max(1, min(16, next_power_of_2(self._columns) // 512)),
        )

    def _many(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, out: Tensor
    ) -> None:
        shape = self._chunks
        sum_chunks_kernel[(min(self._programs, cdiv(len(x), shape.rows)),)](
            *self._rows(x, residual, weight, out),
            self._places.flags,
            self._places.numbers,
            self._chunk_turns,
            len(x),
            *self._numbers(x, residual, eps),
            self._places.many,
            self.tries,
            **self._constants(x, residual),
            ROWS=shape.rows,
            AHEAD=shape.ahead,
            num_warps=shape.num_warps,
            maxnreg=min(255, REGISTERS // (32 * shape.num_warps * shape.programs)),
        )

    def _rows(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor
    ) -> tuple[Tensor, ...]:
        if residual is None or weight is None:
            return self._stop, x, x, x, out
        assert residual.stride(-1) == 1
        return self._stop, x, residual, weight, out

    def _numbers(self, x: Tensor, residual: Tensor | None, eps: float) -> tuple[int | float, ...]:
        stride = 0 if residual is None else residual.stride(0)
        return self._columns, x.stride(0), stride, eps

    def _constants(self, x: Tensor, residual: Tensor | None) -> dict[str, Any]:
        return {
            "RANK": self.rank,
            "SIZE": self.size,
            "PARTS": x.shape[1] if x.ndim > 2 else 1,
            "NORM": residual is not None,
            "BLOCK": next_power_of_2(self._columns),
            **launch_options(x.device),
        }


def over_peers(
    base: Collectives,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_deterministic: bool,
    few_rows: int = FEW_ROWS,
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
    if min(base.least([memory is not None])) and memory is not None:
        sums = PeerSums(
            *(base, memory, columns, dtype),
            is_deterministic=is_deterministic,
            few_rows=few_rows,
        )
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
    """Returns what is wrong with sums of few rows and of many, each made three times: of numbers
    whose sums every format holds."""
    assert not is_building()
    columns, dtype, size = sums._columns, sums._dtype, sums.size
    generator = torch.Generator().manual_seed(0)
    counts = [1, sums._places.few, sums._places.few + sums._chunks.rows + 1]
    for count in counts[: 3 if sums._places.many else 2] * 3:
        parts = torch.randint(-8, 9, (size, count, columns), generator=generator).to(dtype)
        found = sums.all_reduce(parts[sums.rank].to(device, copy=True)).cpu()
        if int(sums._stop[0]):
            return "another rank's part of a sum did not come"
        if not torch.equal(found, parts.sum(0)):
            return f"a sum of {count} rows over the memory of {size} GPUs was wrong"
    return ""
