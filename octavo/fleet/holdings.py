"""Which engine holds which prefix, as a router knows it: what it sent, and what engines tell.

Owned by a router. A digest of a prefix stands for all blocks before it, so that only hashes of 64
bits are kept: a wrong one costs a longer prompt, never a wrong token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

DEFAULT_CAPACITY = 65_536
"""Blocks that are remembered of an engine that does not tell how many it has."""


class Holdings:
    """The prefixes of one engine. Those that were sent count as held: they soon will be."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        """`capacity` in blocks: beyond it those are forgotten that were used longest ago."""
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, hashes: Iterable[int]) -> None:
        """Digests in the order of their chain, which the engine has stored or is about to."""
        for hash_ in hashes:
            self._known[hash_] = None
            self._known.move_to_end(hash_)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def remove(self, hashes: Iterable[int]) -> None:
        """The engine has evicted them; those that are not known are none of ours."""
        for hash_ in hashes:
            self._known.pop(hash_, None)

    def clear(self) -> None:
        self._known.clear()

    def num_leading(self, hashes: Sequence[int]) -> int:
        """Returns how many leading blocks of a chain are held. Found by halves: whoever holds a
        block holds those before it, or at least did."""
        return bisect_left(range(len(hashes)), True, key=lambda i: hashes[i] not in self._known)
