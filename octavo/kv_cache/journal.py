"""What the prefix cache has gained and lost since somebody looked, for the routers of a fleet.

Made of `news` by the engine core after each step. Holds hashes of 64 bits, not digests: a router
may be wrong, the cache may not.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.kv_cache.hash_memory import hash_of
from octavo.kv_cache.news import Cleared, Event, Stored
from octavo.kv_cache.spec import KVGroup


@dataclass(frozen=True, slots=True)
class Changes:
    """Hashes (uint64) of digests, in the order of their chains."""

    stored: bytes = b""
    removed: bytes = b""
    is_cleared: bool = False
    """All that was known before is gone."""


def widest_group(groups: Sequence[KVGroup]) -> int:
    """Returns the group whose tokens are seen longest: the others keep less of each prefix."""

    def reach(index: int) -> int:
        most = groups[index].spec.visibility.most_visible
        return 0 if groups[index].is_state else sys.maxsize if most is None else most

    return max(range(len(groups)), key=reach)


class Journal:
    """The changes of one KV group: that which sees most, since a hit needs all groups."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._changes: dict[int, bool] = {}
        self._is_cleared = False

    def note(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Cleared):
                self._changes.clear()
                self._is_cleared = True
            elif event.group == self._group:
                for digest in event.digests:
                    self._note(hash_of(digest), isinstance(event, Stored))

    def _note(self, hash_: int, is_there: bool) -> None:
        # What comes and goes between two looks counts as it was last.
        self._changes.pop(hash_, None)
        self._changes[hash_] = is_there

    def take(self) -> Changes | None:
        """Returns what has changed since the last call, None if nothing has."""
        if not self._changes and not self._is_cleared:
            return None
        changes, self._changes = self._changes, {}
        is_cleared, self._is_cleared = self._is_cleared, False
        stored = array("Q", (one for one, is_there in changes.items() if is_there))
        removed = array("Q", (one for one, is_there in changes.items() if not is_there))
        return Changes(stored.tobytes(), removed.tobytes(), is_cleared)
