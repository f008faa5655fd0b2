"""Remembers a number for each of the latest hashes, in memory of a fixed size.

Used for what is nice to know of blocks that are gone, never for what must be right: a hash of 64
bits stands for a key, and a later one takes the place of an earlier one.
"""

from __future__ import annotations

from array import array

_REACH = 8
_NOTHING = 0


def hash_of(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


class HashMemory:
    """About the latest `num_places` hashes, rounded up to a power of two; 16 bytes each.

    A hash lies at one of the few places from that which it names: so hardly one is lost while half
    of the places are empty.
    """

    def __init__(self, num_places: int) -> None:
        self._mask = (1 << max(num_places - 1, 1).bit_length()) - 1
        size = 8 * (self._mask + _REACH)
        self._hashes = array("Q", bytes(size))
        self._numbers = array("Q", bytes(size))
        self.is_used = False
        """Whether anything was ever remembered: spares who asks for each of many."""

    def put(self, hash_: int, number: int) -> None:
        """Remembers `number` (0..2^64 - 1) for `hash_` (the same; not 0)."""
        first = hash_ & self._mask
        near = self._hashes[first : first + _REACH].tolist()
        if hash_ in near:
            place = first + near.index(hash_)
        elif _NOTHING in near:
            place = first + near.index(_NOTHING)
        else:
            place = first + (hash_ >> 32) % _REACH
        self.is_used = True
        self._hashes[place] = hash_
        self._numbers[place] = number

    def add(self, hash_: int, number: int) -> None:
        """As `put`, of a hash that is not remembered, or where none is ever forgotten; most often
        several times faster."""
        place = hash_ & self._mask
        if self._hashes[place] != _NOTHING:
            self.put(hash_, number)
            return
        self.is_used = True
        self._hashes[place] = hash_
        self._numbers[place] = number

    def get(self, hash_: int) -> int | None:
        place = self._find(hash_)
        return None if place is None else self._numbers[place]

    def pop(self, hash_: int) -> int | None:
        """Forgets `hash_`; returns its number, None if it is not remembered."""
        place = self._find(hash_)
        if place is None:
            return None
        self._hashes[place] = _NOTHING
        return self._numbers[place]

    def _find(self, wanted: int) -> int | None:
        """Returns where `wanted` lies."""
        first = wanted & self._mask
        near = self._hashes[first : first + _REACH]
        # Most often it is not there, and an exception would take longer than the search.
        return first + near.index(wanted) if wanted in near else None
