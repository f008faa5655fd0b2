"""Finds how much longer blocks should stay that somebody came back for, by trying it.

Called by the order of eviction alone. Knows blocks by a hash of what they hold.

No one order is best: where some prompts are asked for again and again, uses should count for much;
where conversations grow and end, only when a block was given back. So a few orders run beside the
true one, each in a small cache of its own, over a sample of the blocks (Waldspurger et al., Cache
Modeling and Optimization using Miniature Simulations, 2017). A small cache of a sixteenth of the
blocks sees a sixteenth of what is asked for, so that it stands for the whole.

The first order is that of age alone (LRU). Another one is taken when it has found clearly more, of
late and also just now, and is left at once when it no longer does: so the worst that can happen is
what happens until that is seen. Of those that found nearly the same the one goes furthest from LRU:
what many uses are worth takes longest to show.
"""

from __future__ import annotations

import math

NUM_CLASSES = 6
ORDERS: tuple[tuple[float, ...], ...] = (
    (1.0,) * NUM_CLASSES,
    (1.0, *(3.0,) * (NUM_CLASSES - 1)),
    tuple(4.0**number for number in range(NUM_CLASSES)),
    tuple(32.0**number for number in range(NUM_CLASSES)),
)
"""By class of uses: how many times longer a block stays than one of the first class."""
_MIN_SAMPLE, _MAX_SAMPLED = 512, 64
"""Blocks that a small cache should hold; each holds one of so many blocks at the least."""
_CHOICES = 16
"""Times that an order is chosen while as many blocks are evicted as there are."""
_LATE, _JUST_NOW = 1.0, 0.125
"""Half-lives of what was found, in blocks evicted over blocks there are."""
_CLEARLY = 1 / 24
"""Of the blocks of a small cache: by how many hits an order must lead."""


class Trial:
    """For a cache of `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        every = 1 << max(num_blocks // _MIN_SAMPLE, 1).bit_length() - 1
        self.sample_mask = min(every, _MAX_SAMPLED) - 1
        """A block is in the sample if its hash has none of these bits."""
        size = max(num_blocks // (self.sample_mask + 1), 1)
        self.caches = tuple(_SmallCache(size, order) for order in ORDERS)
        self._enough = max(_CLEARLY * size, 1.0)
        self._period = max(num_blocks // _CHOICES, 1)
        self._fade_late = 2 ** -(self._period / (_LATE * num_blocks))
        self._fade_just_now = 2 ** -(self._period / (_JUST_NOW * num_blocks))
        self._num_evicted = 0
        self._forget_leads()

    def _forget_leads(self) -> None:
        self._leads = [0.0] * len(ORDERS)
        self._late = [0.0] * len(ORDERS)
        self._just_now = [0.0] * len(ORDERS)
        self._chosen = 0

    @property
    def order(self) -> tuple[float, ...]:
        """The one of `ORDERS` that is best now."""
        return ORDERS[self._chosen]

    def asked_for(self, hashes: list[int]) -> None:
        """Somebody wants the blocks of sampled `hashes`, in the true cache or not."""
        first, *others = self.caches
        expected = first.count(hashes)
        for number, cache in enumerate(others, start=1):
            self._leads[number] += cache.count(hashes) - expected

    def given_back(self, hash_: int, class_: int, time: int) -> None:
        """Nobody uses the block of a sampled `hash_` any more."""
        first, *others = self.caches
        first.append(hash_, 0, time)  # all classes are alike to it
        for cache in others:
            cache.append(hash_, class_, time)

    def evicted(self, count: int) -> bool:
        """So many blocks, sampled or not, were evicted from the true cache; returns whether the
        order may be another."""
        self._num_evicted += count
        if self._num_evicted < self._period:
            return False
        self._num_evicted = 0
        self._choose()
        return True

    def _choose(self) -> None:
        for number, lead in enumerate(self._leads):
            self._late[number] = self._fade_late * self._late[number] + lead
            self._just_now[number] = self._fade_just_now * self._just_now[number] + lead
        self._leads = [0.0] * len(ORDERS)
        good = {
            number: late
            for number, (late, now) in enumerate(zip(self._late, self._just_now, strict=True))
            if late > self._enough and now > 0
        }
        nearly_most = max(good.values(), default=0.0) - self._enough
        self._chosen = max((one for one, late in good.items() if late > nearly_most), default=0)

    def clear(self) -> None:
        """Nothing is cached any more."""
        for cache in self.caches:
            cache.clear()
        self._forget_leads()


class _SmallCache:
    """Hashes of blocks; the one goes first that is oldest for its class."""

    def __init__(self, size: int, order: tuple[float, ...]) -> None:
        self._size = size
        self._times_a_class = order
        self._queues: tuple[dict[int, int], ...] = tuple({} for _ in order)
        """Of each class: when a block was given back, oldest first."""
        self._class_of: dict[int, int] = {}

    def __contains__(self, hash_: int) -> bool:
        return hash_ in self._class_of

    def count(self, hashes: list[int]) -> int:
        """Returns how many of `hashes` are here."""
        return sum(map(self._class_of.__contains__, hashes))

    def __len__(self) -> int:
        return len(self._class_of)

    def append(self, hash_: int, class_: int, time: int) -> None:
        before = self._class_of.get(hash_)
        if before is not None:
            del self._queues[before][hash_]
        elif len(self._class_of) >= self._size:
            self._evict(time)
        self._queues[class_][hash_] = time
        self._class_of[hash_] = class_

    def _evict(self, time: int) -> None:
        first = self._queues[0]
        if len(first) == len(self._class_of):  # most often
            oldest = next(iter(first))
            del first[oldest], self._class_of[oldest]
            return
        most, chosen, oldest = -math.inf, 0, 0
        for class_, queue in enumerate(self._queues):
            if queue:
                hash_ = next(iter(queue))
                age = (time - queue[hash_]) / self._times_a_class[class_]
                if age > most:
                    most, chosen, oldest = age, class_, hash_
        del self._queues[chosen][oldest]
        del self._class_of[oldest]

    def clear(self) -> None:
        for queue in self._queues:
            queue.clear()
        self._class_of.clear()
