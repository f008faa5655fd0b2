"""Owns the order in which cached blocks that nobody uses lose their prefix.

Called by the block pool alone.

A block's uses are the time that it was stored and all times that somebody came back for it; a
block that is stored again not long after it was evicted keeps those that it had. By its uses (1, 2,
up to 4, up to 8, up to 16, more) a block stands in one of six queues, each oldest first by when the
block was given back. Of the heads of the queues that one goes whose age is the largest, where an
age counts less the more uses a queue's blocks have. How much less, a trial finds (see there):
nothing where uses tell nothing of what is asked for next, which is LRU.

A block has at most the uses of the one before it in a prompt, and is given back no later: so the
last blocks of prompts go first. Only a block that was computed twice (the last of a prompt that was
cached as a whole) may go while blocks behind it stay, which cannot be found then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.hash_memory import HashMemory, hash_of
from octavo.kv_cache.oldest_first import NOWHERE, OldestFirst
from octavo.kv_cache.trial import NUM_CLASSES, Trial
from octavo.step import Int32

_MAX_REMEMBERED = 1 << 18
_MAX_USES = 255
_CLASS_OF = np.array(
    [min(max(uses - 1, 0).bit_length(), NUM_CLASSES - 1) for uses in range(_MAX_USES + 1)],
    np.uint8,
)
"""By uses."""


class EvictionOrder:
    """Blocks below `num_blocks`; each at most once."""

    def __init__(self, num_blocks: int) -> None:
        self._queue_of = np.full(num_blocks, NOWHERE, np.uint8)
        places = np.zeros(num_blocks, np.int32)
        self._queues = tuple(
            OldestFirst(number, self._queue_of, places) for number in range(NUM_CLASSES)
        )
        self._uses = np.ones(num_blocks, np.uint8)
        """Of blocks that hold no prefix 1."""
        self._times: NDArray[np.int64] = np.zeros(num_blocks, np.int64)
        """When a block came in, counted in blocks that came in."""
        self._time = self._count = 0
        self._evicted = HashMemory(min(8 * num_blocks, _MAX_REMEMBERED))
        """By digest: the uses that it had."""
        self._trial = Trial(num_blocks)
        self.weigh(self._trial.order)
        self._sampled: dict[int, int] = {}
        """Blocks that the trial looks at, and their hashes."""
        self._sample_mask = self._trial.sample_mask
        self._is_sampled = np.zeros(num_blocks, np.bool_)

    def __len__(self) -> int:
        return self._count

    def weigh(self, order: tuple[float, ...]) -> None:
        """Ages count by `order` (see `ORDERS`) from now on, until the trial knows better."""
        self._weights = order

    def __contains__(self, block: int) -> bool:
        return self._queue_of.item(block) != NOWHERE

    def stored(self, block: int, digest: bytes, parent: int) -> None:
        """`block` holds the prefix `digest` from now on, `parent` (0: none) the one before it.

        It counts as used no more often than its parent, without which it cannot be found.
        """
        hash_ = hash_of(digest)
        before = self._evicted.pop(hash_) if self._evicted.is_used else None
        if before is not None:
            most = self._uses.item(parent) if parent else _MAX_USES
            self._uses[block] = min(before + 1, most)
        if not hash_ & self._sample_mask:
            self._is_sampled[block] = True
            self._sampled[block] = hash_
            self._trial.asked_for([hash_])

    def stored_all(self, blocks: list[int], digests: list[bytes], parents: list[int]) -> None:
        """As `stored` of each in turn; the digests are whole ones."""
        if self._evicted.is_used:
            for block, digest, parent in zip(blocks, digests, parents, strict=True):
                self.stored(block, digest, parent)
            return
        hashes = np.frombuffer(b"".join(digests), "<u8")[:: len(digests[0]) // 8]
        sampled = np.flatnonzero(hashes & np.uint64(self._sample_mask) == 0).tolist()
        for place in sampled:
            self.stored(blocks[place], digests[place], parents[place])

    def was_evicted(self, digest: bytes) -> bool:
        """Whether a block that held `digest` was evicted, and none has held it since; of those that
        were evicted long ago it is not known."""
        return self._evicted.get(hash_of(digest)) is not None

    def append(self, blocks: Int32) -> None:
        """Takes in blocks that were given back, the first of which is to go first."""
        self._times[blocks] = np.arange(self._time, self._time + len(blocks))
        self._time += len(blocks)
        self._count += len(blocks)
        classes = _CLASS_OF[self._uses[blocks]]
        for block in blocks[self._is_sampled[blocks]].tolist():
            class_, time = int(_CLASS_OF[self._uses[block]]), self._times.item(block)
            self._trial.given_back(self._sampled[block], class_, time)
        if not classes.any():
            self._queues[0].append(blocks)  # most often
            return
        for number, count in enumerate(np.bincount(classes).tolist()):
            if count:
                self._queues[number].append(blocks[classes == number])

    def remove(self, blocks: Int32) -> None:
        """Takes out those of `blocks` that are here: somebody uses them."""
        queues = self._queue_of[blocks]
        queues = queues[queues != NOWHERE]
        if not len(queues):
            return
        self._count -= len(queues)
        for number, count in enumerate(np.bincount(queues).tolist()):
            self._queues[number].took_out(count)
        self._queue_of[blocks] = NOWHERE

    def asked_for(self, blocks: Int32) -> None:
        """Somebody came back for `blocks`, in here or not."""
        sampled = blocks[self._is_sampled[blocks]].tolist()
        if sampled:
            self._trial.asked_for([self._sampled[block] for block in sampled])
        self._uses[blocks] = np.minimum(self._uses[blocks], _MAX_USES - 1) + 1

    def uses(self, blocks: Int32) -> Int32:
        """Returns the uses of each, the time that it was stored among them."""
        return self._uses[blocks].astype(np.int32)

    def next(self, count: int) -> Int32:
        """Returns those that are to go first: one at least, which there must be, `count` at most,
        the first of them first."""
        ages = [self._age(number) for number in range(NUM_CLASSES)]
        number = ages.index(max(ages))
        first = self._queues[number].first(count)
        # Those behind the head go too as long as they are older than the heads of other queues.
        ages[number] = 0.0
        latest = self._time - max(ages) * self._weights[number]
        return first[: max(int(np.searchsorted(self._times[first], latest, side="right")), 1)]

    def _age(self, number: int) -> float:
        """Returns how old the head of a queue counts, 0 if the queue is empty."""
        queue = self._queues[number]
        if not len(queue):
            return 0.0
        return (self._time - self._times.item(queue.oldest())) / self._weights[number]

    def evict(self, blocks: Int32, digests: list[bytes]) -> None:
        """Takes out `blocks`, which must be here and hold `digests`."""
        self.remove(blocks)
        remember = self._evicted.add  # whatever is stored is not remembered: see `stored`
        for digest, uses in zip(digests, self._uses[blocks].tolist(), strict=True):
            remember(hash_of(digest), uses)
        self._uses[blocks] = 1
        self._is_sampled[blocks] = False
        if self._trial.evicted(len(blocks)):
            self.weigh(self._trial.order)

    def all(self) -> Int32:
        return np.concatenate([queue.all() for queue in self._queues])

    def clear(self) -> Int32:
        """Takes out all blocks; returns them."""
        blocks = self.all()
        self.remove(blocks)
        self._uses[:] = 1
        self._is_sampled[:] = False
        self._trial.clear()
        self.weigh(self._trial.order)
        return blocks
