"""Remembers a number for each of the latest hashes, in memory of a fixed size.

Used for what is nice to know of blocks that are gone, never for what must be right: a hash of 64
bits stands for a key, and a later one takes the place of an earlier one.
"""

from __future__ import annotations

from array import array


def hash_of(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


class HashMemory:
    """About the latest `num_places` hashes, rounded up to a power of two; 16 bytes each."""

    def __init__(self, num_places: int) -> None:
        self._mask = (1 << max(num_places - 1, 1).bit_length()) - 1
        self._hashes = array("Q", bytes(8 * (self._mask + 1)))
        self._numbers = array("Q", bytes(8 * (self._mask + 1)))
        self.is_used = False
        """Whether anything was ever remembered: spares who asks for each of many."""

    def put(self, hash_: int, number: int) -> None:
        """Remembers `number` (0..2^64 - 1) for `hash_` (the same; not 0)."""
        place = hash_ & self._mask
        self.is_used = True
        self._hashes[place] = hash_
        self._numbers[place] = number

    def get(self, hash_: int) -> int | None:
        place = hash_ & self._mask
        return self._numbers[place] if self._hashes[place] == hash_ else None

    def pop(self, hash_: int) -> int | None:
        """Forgets `hash_`; returns its number, None if it is not remembered."""
        number = self.get(hash_)
        if number is not None:
            self._hashes[hash_ & self._mask] = 0
        return number
