"""What changed in the prefix cache since somebody looked last: which blocks can be found.

Written by the KV cache manager and its ledger, if anybody wants to know; taken by the engine core
once a step. Never sends anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.kv_cache.block_pool import BlockKey
from octavo.kv_cache.records import SequenceKV


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks of one prompt in one KV group."""

    group: int
    digests: tuple[bytes, ...]
    parent: bytes | None
    """Digest of the block before the first one; None: it is the first of its prompt."""
    token_ids: array[int]
    """Of all these blocks together."""
    salt: str
    """What kept the prompt apart from those of others; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks of one KV group."""

    group: int
    digests: list[bytes]
    """Grows until the events are taken."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """All blocks of all groups."""


Event = Stored | Removed | Cleared


class CacheNews:
    """Events in the order in which they happened. `groups` are those that are told of."""

    def __init__(self, groups: Iterable[int], block_size: int) -> None:
        self._block_size = block_size
        self._groups = frozenset(groups)
        self._events: list[Event] = []
        self._inserted: set[bytes] = set()

    def insert(self, key: BlockKey) -> None:
        """A block can be found; `store` tells of what prompt."""
        if key.group in self._groups:
            self._inserted.add(key.digest)

    def store(
        self, group: int, kv: SequenceKV, first: int, last: int, token_ids: array[int]
    ) -> None:
        """Tells of what was inserted of a sequence's blocks first..last (excluded) in a group."""
        digests, size, inserted = kv.digests, self._block_size, self._inserted
        if not inserted:
            return
        start = first
        for place in range(first, last + 1):
            if place < last and digests[place] in inserted:
                continue
            if start < place:
                stored = Stored(
                    group,
                    tuple(digests[start:place]),
                    digests[start - 1] if start else None,
                    token_ids[start * size : place * size],
                    kv.salt,
                )
                self._events.append(stored)
            start = place + 1
        inserted.clear()

    def remove(self, key: BlockKey) -> None:
        """A block can be found no more."""
        if key.group not in self._groups:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Removed) and last.group == key.group:
            last.digests.append(key.digest)
        else:
            self._events.append(Removed(key.group, [key.digest]))

    def clear(self) -> None:
        """Nothing can be found any more."""
        self._events.append(Cleared())

    def take(self) -> list[Event]:
        """Returns what happened since the last call."""
        events, self._events = self._events, []
        return events
