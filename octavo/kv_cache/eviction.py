"""Owns the order in which cached blocks that nobody uses lose their prefix.

Called by the block pool alone.

Two queues, each oldest first by when the block was last given back. `new` has the blocks that
nobody came back for since they were stored, `known` those that somebody did. New ones go first, as
most of them are never asked for again (their number is what drives useful blocks out of a plain
LRU). A known block counts as PATIENCE times younger than it is: when it has not been asked for so
long, what made it useful is over, and it goes before new ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.step import Bool, Int32

PATIENCE = 8


class _OldestFirst:
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

    def append(self, blocks: Int32) -> None:
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


class EvictionOrder:
    """Blocks below `num_blocks`; each at most once."""

    def __init__(self, num_blocks: int) -> None:
        self._new = _OldestFirst(num_blocks)
        self._known = _OldestFirst(num_blocks)
        self._was_hit = np.zeros(num_blocks, np.bool_)
        self._times: NDArray[np.int64] = np.zeros(num_blocks, np.int64)
        """When a block came in, counted in blocks that came in."""
        self._time = 0

    def __len__(self) -> int:
        return len(self._new) + len(self._known)

    def __contains__(self, block: int) -> bool:
        return block in self._new or block in self._known

    def append(self, blocks: Int32) -> None:
        """Takes in blocks that were given back, the first of which is to go first."""
        self._times[blocks] = np.arange(self._time, self._time + len(blocks))
        self._time += len(blocks)
        was_hit = self._was_hit[blocks]
        self._new.append(blocks[~was_hit])
        self._known.append(blocks[was_hit])

    def remove(self, blocks: Int32) -> None:
        """Takes out those of `blocks` that are here: somebody uses them."""
        self._new.remove(blocks)
        self._known.remove(blocks)

    def hit(self, blocks: Int32) -> None:
        """Somebody came back for `blocks`, in here or not."""
        self._was_hit[blocks] = True

    def oldest(self, count: int) -> Int32:
        """Returns those that are to go first: one at least, which there must be, `count` at most,
        the first of them first."""
        return self._next().first(count)

    def evict(self, blocks: Int32) -> None:
        """Takes out `blocks`, which must be here; they are as if never stored."""
        self.remove(blocks)
        self._was_hit[blocks] = False

    def _next(self) -> _OldestFirst:
        if not len(self._known):
            return self._new
        if not len(self._new):
            return self._known
        known, new = self._times.item(self._known.oldest()), self._times.item(self._new.oldest())
        return self._known if self._time - known > PATIENCE * (self._time - new) else self._new

    def all(self) -> Int32:
        return np.concatenate((self._new.all(), self._known.all()))

    def clear(self) -> Int32:
        """Takes out all blocks and forgets what was ever asked for; returns those taken out."""
        blocks = self.all()
        self.remove(blocks)
        self._was_hit[:] = False
        return blocks
