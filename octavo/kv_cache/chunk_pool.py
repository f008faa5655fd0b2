"""Owns the chunks of the arena: who has which. No torch.

Called by whoever lends memory out in smaller pieces: the pools of pages today. Never knows what a
chunk is used for.
"""

from __future__ import annotations

import numpy as np

from octavo.step import Bool, Int32

NOBODY = -1


class ChunkPool:
    """Chunks are numbered from the start of the arena; owners are numbers of their own choice."""

    def __init__(self, num_chunks: int) -> None:
        self._owners = np.full(num_chunks, NOBODY, np.int8)
        self.num_free = num_chunks

    def __len__(self) -> int:
        return len(self._owners)

    def take(self, owner: int, count: int) -> Int32:
        """Returns `count` chunks that are `owner`'s now, the first free ones; so many must be
        free."""
        assert count <= self.num_free, "take more chunks than are free"
        if count == len(self._owners):
            chunks = np.arange(count, dtype=np.int32)
        else:
            chunks = np.flatnonzero(self._owners == NOBODY)[:count].astype(np.int32)
        self._owners[chunks] = owner
        self.num_free -= count
        return chunks

    def give_back(self, owner: int, chunks: Int32) -> None:
        """Makes chunks of `owner` free."""
        assert (self._owners[chunks] == owner).all(), "give back what belongs to another"
        self._owners[chunks] = NOBODY
        self.num_free += len(chunks)

    def is_owned(self, owner: int) -> Bool:
        """Returns [chunks]: which of them are `owner`'s."""
        return self._owners == owner
