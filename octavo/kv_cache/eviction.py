"""Owns the order in which cached blocks that nobody uses lose their prefix.

Called by the block pool alone.

A block's uses are the time that it was stored and all times that somebody came back for it; a
block that is stored again not long after it was evicted keeps those that it had. Blocks of one use,
of two and three, of four to seven, and of more stand in four queues, each oldest first by when the
block was given back. Of the heads of the queues that one goes whose age is the largest, where an
age counts PATIENCE times less with every queue.

How patient the order is, it learns from what it regrets. Asked for again is a block of one use that
was evicted just now: there should be fewer old ones (patience falls). Asked for is one of more uses
that was about to go: there should be more, but that counts half, as it is not gone yet. So blocks
that nobody asks for again cannot drive out useful ones, and these go when what made them useful is
over.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.hash_memory import HashMemory, hash_of
from octavo.kv_cache.oldest_first import OldestFirst
from octavo.step import Int32

_NUM_QUEUES = 4
_FIRST_PATIENCE, _MAX_PATIENCE = 3.0, 32.0
_LEARNING = 16
"""Times that patience is doubled when as many blocks as are watched are asked for."""
_WATCHED_SHARE, _MIN_WATCHED = 1 / 8, 32
_MAX_REMEMBERED = 1 << 18
_ABOUT_TO_GO = 0.5
"""What a regret of a block that is about to go counts, against one of a block that is gone."""
_QUEUE_OF = np.array(
    [0, *(min(uses.bit_length() - 1, _NUM_QUEUES - 1) for uses in range(1, 256))], np.uint8
)
"""By uses."""


class EvictionOrder:
    """Blocks below `num_blocks`; each at most once."""

    def __init__(self, num_blocks: int) -> None:
        self._queues = tuple(OldestFirst(num_blocks) for _ in range(_NUM_QUEUES))
        self._uses = np.ones(num_blocks, np.uint8)
        self._times: NDArray[np.int64] = np.zeros(num_blocks, np.int64)
        """When a block came in, counted in blocks that came in."""
        self._time = self._num_evicted = self._count = 0
        self._evicted = HashMemory(min(8 * num_blocks, _MAX_REMEMBERED))
        """By digest: how many had been evicted before it, and its uses in the lowest byte."""
        self._patience = _FIRST_PATIENCE
        self._num_watched = max(int(_WATCHED_SHARE * num_blocks), _MIN_WATCHED)
        self._watched_until = -1
        """Blocks of several uses that came in before this time are about to go."""
        self._watch_again = 0
        """When so many are evicted, that time is found anew."""

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return any(block in queue for queue in self._queues)

    def stored(self, block: int, digest: bytes, parent: int) -> None:
        """`block` holds the prefix `digest` from now on, `parent` (0: none) the one before it.

        It counts as used no more often than its parent, without which it cannot be found.
        """
        self._uses[block] = 1
        before = self._evicted.pop(hash_of(digest)) if self._evicted.is_used else None
        if before is None:
            return
        num_evicted, uses = divmod(before, 256)
        self._uses[block] = min(uses + 1, 255, self._uses.item(parent) if parent else 255)
        if uses == 1 and self._num_evicted - num_evicted <= self._num_watched:
            self._learn(-1)

    def was_evicted(self, digest: bytes) -> bool:
        """Whether a block that held `digest` was evicted, and none has held it since; of those that
        were evicted long ago it is not known."""
        return self._evicted.get(hash_of(digest)) is not None

    def append(self, blocks: Int32) -> None:
        """Takes in blocks that were given back, the first of which is to go first."""
        self._times[blocks] = np.arange(self._time, self._time + len(blocks))
        self._time += len(blocks)
        self._count += len(blocks)
        queue_of = _QUEUE_OF[self._uses[blocks]]
        if not queue_of.any():
            self._queues[0].append(blocks)  # most often
            return
        for number, queue in enumerate(self._queues):
            queue.append(blocks[queue_of == number])

    def remove(self, blocks: Int32) -> None:
        """Takes out those of `blocks` that are here: somebody uses them."""
        for queue in self._queues:
            if len(queue):
                self._count -= len(queue)
                queue.remove(blocks)
                self._count += len(queue)

    def asked_for(self, blocks: Int32) -> None:
        """Somebody came back for `blocks`, in here or not."""
        uses = self._uses[blocks]
        if self._watched_until >= 0:
            is_old = (uses > 1) & (self._times[blocks] < self._watched_until)
            known = blocks[is_old]
            regrets = sum(int(np.count_nonzero(q.has(known))) for q in self._queues[1:])
            self._learn(_ABOUT_TO_GO * regrets)
        self._uses[blocks] = np.minimum(uses, 254) + 1

    def _learn(self, regrets: float) -> None:
        """`regrets`: of blocks of several uses, less those of blocks of one use."""
        patience = self._patience * 2 ** (_LEARNING * regrets / self._num_watched)
        self._patience = min(max(patience, 1.0), _MAX_PATIENCE)

    def next(self, count: int) -> Int32:
        """Returns those that are to go first: one at least, which there must be, `count` at most,
        the first of them first."""
        ages = [self._age(number) for number in range(_NUM_QUEUES)]
        number = ages.index(max(ages))
        first = self._queues[number].first(count)
        # Those behind the head go too as long as they are older than the heads of other queues.
        ages[number] = 0.0
        latest = self._time - max(ages) * self._patience**number
        return first[: max(int(np.searchsorted(self._times[first], latest, side="right")), 1)]

    def _age(self, number: int) -> float:
        """Returns how old the head of a queue counts, 0 if the queue is empty."""
        queue = self._queues[number]
        if not len(queue):
            return 0.0
        return (self._time - self._times.item(queue.oldest())) / self._patience**number

    def evict(self, blocks: Int32, digests: list[bytes]) -> None:
        """Takes out `blocks`, which must be here and hold `digests`."""
        self.remove(blocks)
        for digest, uses in zip(digests, self._uses[blocks].tolist(), strict=True):
            self._evicted.put(hash_of(digest), self._num_evicted * 256 + uses)
            self._num_evicted += 1
        self._uses[blocks] = 1
        if self._num_evicted >= self._watch_again:
            self._watch()

    def _watch(self) -> None:
        """Finds which blocks of several uses are about to go."""
        count = self._num_watched
        self._watch_again = self._num_evicted + count // 4
        oldest = [queue.first(count) for queue in self._queues[1:] if len(queue)]
        times = np.sort(self._times[np.concatenate(oldest)]) if oldest else np.array([-1])
        self._watched_until = int(times[min(count, len(times) - 1)])

    def all(self) -> Int32:
        return np.concatenate([queue.all() for queue in self._queues])

    def clear(self) -> Int32:
        """Takes out all blocks; returns them."""
        blocks = self.all()
        self.remove(blocks)
        return blocks
