"""Finds what is cached of a sequence's tokens, in all KV groups together.

Owned by the KV cache manager. Takes no page and counts no reference.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from octavo.kv_cache.announced import Announced
from octavo.kv_cache.block_pool import NULL_BLOCK
from octavo.kv_cache.ledger import PageLedger
from octavo.kv_cache.prefix_index import Digester
from octavo.kv_cache.records import PrefixHit, SequenceKV
from octavo.kv_cache.resume import can_resume
from octavo.kv_cache.state_pages import StatePages
from octavo.kv_cache.token_pages import TokenPages
from octavo.step import Int32


class Prefixes:
    """Of one manager, whose groups, ledger and announcements these are."""

    def __init__(
        self,
        groups: Sequence[TokenPages | StatePages],
        ledger: PageLedger,
        announced: Announced,
        block_size: int,
    ) -> None:
        self._groups = groups
        self._ledger = ledger
        self._announced = announced
        self._block_size = block_size
        self._digester = Digester()
        self._no_pages: tuple[Int32, ...] = tuple(np.zeros(0, np.int32) for _ in groups)

    def lookup(self, kv: SequenceKV, token_ids: array[int]) -> PrefixHit:
        """See `KVCacheManager.lookup`."""
        limit = (len(token_ids) - 1) // self._block_size
        if not kv.reads_cache or not limit:
            return PrefixHit(0, False, "too_short" if kv.reads_cache else None, self._no_pages)
        self.digest(kv, token_ids)
        digests = kv.digests[:limit]
        count, pages = self._find(digests)
        reason, is_computing = None, False
        if count < limit:
            missing, content = digests[count], self.content(token_ids, count)
            was_evicted = self._ledger.pools.was_evicted(missing)
            index = self._ledger.index
            reason = index.miss_reason(missing, content, kv.root, was_evicted=was_evicted)
            is_computing = missing in self._announced
        return PrefixHit(count, is_computing, reason, pages)

    def digest(self, kv: SequenceKV, token_ids: array[int]) -> None:
        """Sees to it that `kv` has the digests of all full blocks of its tokens."""
        self._digester.extend(kv.digests, kv.root, token_ids, self._block_size, kv.extras)

    def content(self, token_ids: array[int], block: int) -> int:
        """Returns a hash of the tokens of a block alone, whatever is before them."""
        first = block * self._block_size
        return hash(token_ids[first : first + self._block_size].tobytes())

    def _find(self, digests: list[bytes]) -> tuple[int, tuple[Int32, ...]]:
        """Returns the longest cached prefix in blocks that every group can go on from, and the
        pages of each with which a sequence does."""
        if not all(group.may_know(digests[0]) for group in self._groups):
            return 0, self._no_pages  # most prompts that hit nothing
        found = [group.find(digests) for group in self._groups]
        ends = [
            can_resume(group.group.spec.visibility, pages != NULL_BLOCK, self._block_size)
            for group, pages in zip(self._groups, found, strict=True)
        ]
        count = int(np.flatnonzero(np.logical_and.reduce(ends))[-1])
        pairs = zip(self._groups, found, strict=True)
        return count, tuple(group.of_hit(one, count) for group, one in pairs)
