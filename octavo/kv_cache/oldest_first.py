"""Blocks in the order in which they came, any of which may be taken out. No torch."""

from __future__ import annotations

import numpy as np

from octavo.step import Bool, Int32


class OldestFirst:
    """Blocks in the order in which they came in; any of them may be taken out.

    Long sequences bring and take thousands at a time, so none is handled alone: a block knows the
    place of its latest entry, and entries at other places no longer count.
    """

    def __init__(self, num_blocks: int) -> None:
        self._entries = np.zeros(2 * num_blocks, np.int32)
        self._first = self._end = 0
        self._places = np.full(num_blocks, -1, np.int32)
        """Of each block's entry; -1 for blocks that are not in here."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return bool(self._places[block] >= 0)

    def has(self, blocks: Int32) -> Bool:
        """Returns which of `blocks` are in here."""
        return self._places[blocks] >= 0

    def append(self, blocks: Int32) -> None:
        """Takes in blocks that are not in here."""
        if not len(blocks):
            return
        if self._end + len(blocks) > len(self._entries):
            counting = self.all()
            self._first = self._end = 0
            self._write(counting)
        self._write(blocks)
        self._count += len(blocks)

    def _write(self, blocks: Int32) -> None:
        first, self._end = self._end, self._end + len(blocks)
        self._entries[first : self._end] = blocks
        self._places[blocks] = np.arange(first, self._end)

    def remove(self, blocks: Int32) -> None:
        """Takes out those of `blocks` that are in here."""
        self._count -= int(np.count_nonzero(self._places[blocks] >= 0))
        self._places[blocks] = -1

    def oldest(self) -> int:
        """Returns the oldest, which there must be."""
        block = self._entries.item(self._first)
        if self._places.item(block) != self._first:
            self._skip()
            block = self._entries.item(self._first)
        return block

    def first(self, count: int) -> Int32:
        """Returns the oldest, one at least, which there must be, and `count` at most."""
        self.oldest()
        stop = min(self._first + 2 * count, self._end)
        return self._entries[self._first : stop][self._counts(self._first, stop)][:count]

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
        return self._places[blocks] == np.arange(first, first + len(blocks))
