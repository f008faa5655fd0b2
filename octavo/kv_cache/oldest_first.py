"""Blocks in the order in which they came, any of which may be taken out. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.step import Bool, Int32

NOWHERE = 255
"""In place of a queue's number."""


class OldestFirst:
    """One of several queues, each of which has a block at most once and no block of another.

    Long sequences bring and take thousands at a time, so none is handled alone: a block knows its
    queue and the place of its latest entry there, and entries at other places no longer count.
    """

    def __init__(self, number: int, queue_of: NDArray[np.uint8], places: Int32) -> None:
        """`queue_of` [num_blocks] and `places` [num_blocks] are those of all queues together."""
        self._number, self._queue_of, self._places = number, queue_of, places
        self._entries = np.zeros(64, np.int32)
        self._first = self._end = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, blocks: Int32) -> None:
        """Takes in blocks that are in no queue."""
        if self._end + len(blocks) > len(self._entries):
            self._make_room(len(blocks))
        self._write(blocks)
        self._count += len(blocks)

    def _make_room(self, count: int) -> None:
        """Moves the entries that count to the front, of as many places again at least."""
        counting = self.all()
        wanted = 2 * (len(counting) + count)
        if wanted > len(self._entries):
            self._entries = np.zeros(wanted, np.int32)
        self._first = self._end = 0
        self._write(counting)

    def _write(self, blocks: Int32) -> None:
        first, self._end = self._end, self._end + len(blocks)
        self._entries[first : self._end] = blocks
        self._places[blocks] = np.arange(first, self._end)
        self._queue_of[blocks] = self._number

    def took_out(self, count: int) -> None:
        """So many that were in here are in no queue any more."""
        self._count -= count

    def oldest(self) -> int:
        """Returns the oldest, which there must be."""
        block = self._entries.item(self._first)
        if not self._is_at(block, self._first):
            self._skip()
            block = self._entries.item(self._first)
        return block

    def first(self, count: int) -> Int32:
        """Returns the oldest, one at least, which there must be, and `count` at most."""
        self.oldest()
        stop = min(self._first + 2 * count, self._end)
        return self._entries[self._first : stop][self._counts(self._first, stop)][:count]

    def _is_at(self, block: int, place: int) -> bool:
        return self._places.item(block) == place and self._queue_of.item(block) == self._number

    def _skip(self) -> None:
        """Goes on to the next entry that counts."""
        width = 64
        while not self._counts(self._first, self._first + width).any():
            self._first += width
            width *= 2
        self._first += int(self._counts(self._first, self._first + width).argmax())

    def all(self) -> Int32:
        return self._entries[self._first : self._end][self._counts(self._first, self._end)]

    def _counts(self, first: int, stop: int) -> Bool:
        """Returns which of the entries from `first` to `stop` count."""
        blocks = self._entries[first : min(stop, self._end)]
        is_latest = self._places[blocks] == np.arange(first, first + len(blocks))
        return is_latest & (self._queue_of[blocks] == self._number)
