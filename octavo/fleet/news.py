"""What an engine holds, for routers that look at it now and then and not at each step.

Owned by whoever has an engine whose routers are elsewhere; `since` is what a router asks. Pure.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass

MAX_KEPT = 1024
"""Changes that are told one by one; whoever has missed more is told of everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What has changed; hashes as in `kv_cache.journal.Changes`."""

    number: int
    """To be asked with the next time."""
    is_whole: bool = False
    """All that was known before is gone."""
    stored: bytes = b""
    removed: bytes = b""


class NewsLog:
    """The changes of one engine, in order."""

    def __init__(self, capacity: int, max_kept: int = MAX_KEPT) -> None:
        """`capacity`: blocks of the engine, of which no more can be held."""
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=max_kept)
        self._number = 0

    def note(self, stored: bytes, removed: bytes, is_cleared: bool) -> None:
        """The engine tells of a step."""
        if is_cleared:
            self._held.clear()
            self._kept.clear()
            self._number += 1  # so that nobody is up to date
        for hash_ in array("Q", removed):
            self._held.pop(hash_, None)
        for hash_ in array("Q", stored):
            self._held[hash_] = None
            self._held.move_to_end(hash_)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        if stored or removed:
            self._kept.append((stored, removed))
            self._number += 1

    def since(self, number: int | None) -> News:
        """Returns what has changed since a router was told `number`; None: it knows nothing."""
        missed = self._number if number is None else self._number - number
        if number is None or missed > len(self._kept):
            whole = array("Q", self._held).tobytes()
            return News(number=self._number, is_whole=True, stored=whole)
        changes: dict[int, bool] = {}
        for stored, removed in list(self._kept)[len(self._kept) - missed :]:
            # What comes and goes in between counts as it was last.
            for hashes, is_there in ((removed, False), (stored, True)):
                for hash_ in array("Q", hashes):
                    changes.pop(hash_, None)
                    changes[hash_] = is_there
        there = array("Q", (one for one, is_there in changes.items() if is_there))
        gone = array("Q", (one for one, is_there in changes.items() if not is_there))
        return News(number=self._number, stored=there.tobytes(), removed=gone.tobytes())
