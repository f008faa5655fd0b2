"""Memory for weights that are made at load, in large pages where the system has them.

Called by whoever makes weights. A product reads all of its weights once, and small pages cost it up
to a fifth of the memory's rate. A piece goes with the last tensor that lies in it.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

PIECE_BYTES = 32 << 20
"""Tensors share pieces of this size, since most are smaller than a large page."""
_ALIGNMENT = 64


class LargePages:
    """Gives out memory, piece after piece."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor whose numbers mean nothing yet."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + size > len(self._piece):
            self._piece, start = _piece(max(size, PIECE_BYTES)), 0
        self._used = start + size
        return self._piece[start : self._used].view(dtype).view(shape)


def _piece(size: int) -> Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
