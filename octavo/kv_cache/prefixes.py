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
from octavo.kv_cache.prefix_index import PIECE_BLOCKS, Digester
from octavo.kv_cache.records import PrefixHit, SequenceKV
from octavo.kv_cache.resume import can_resume
from octavo.kv_cache.state_pages import StatePages
from octavo.kv_cache.token_pages import TokenPages
from octavo.step import Int32
from octavo.visibility import Full


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
        self._see_all = all(isinstance(one.group.spec.visibility, Full) for one in groups)
        self._no_pages: tuple[Int32, ...] = tuple(np.zeros(0, np.int32) for _ in groups)

    def lookup(self, kv: SequenceKV, token_ids: array[int]) -> PrefixHit:
        """See `KVCacheManager.lookup`."""
        limit = (len(token_ids) - 1) // self._block_size
        if not kv.reads_cache or not limit:
            return PrefixHit(0, False, "too_short" if kv.reads_cache else None, self._no_pages)
        if not kv.digests:
            # Most prompts hit nothing, which the first block tells; the rest of their digests is
            # wanted once they are computed, and made while a device does that.
            self.digest(kv, token_ids, PIECE_BLOCKS)
        digests, count, pages = kv.digests, 0, self._no_pages
        if all(group.may_know(digests[0]) for group in self._groups):
            self.digest(kv, token_ids)
            count, pages = self._find(digests, limit)
        reason, is_computing = None, False
        if count < limit:
            missing, (content,) = digests[count], self.contents(token_ids, count, count + 1)
            was_evicted = self._ledger.pools.was_evicted(missing)
            index = self._ledger.index
            reason = index.miss_reason(missing, content, kv.root, was_evicted=was_evicted)
            is_computing = missing in self._announced
        return PrefixHit(count, is_computing, reason, pages)

    def digest(self, kv: SequenceKV, token_ids: array[int], most: int | None = None) -> None:
        """Sees to it that `kv` has the digests of all full blocks of its tokens, or of the first
        `most`."""
        self._digester.extend(kv.digests, kv.root, token_ids, self._block_size, kv.extras, most)

    def contents(self, token_ids: array[int], first: int, last: int) -> list[int]:
        """Returns a hash of the tokens of each of the blocks first..last (excluded) alone, whatever
        is before them."""
        data = token_ids[first * self._block_size : last * self._block_size].tobytes()
        size = self._block_size * token_ids.itemsize
        return [hash(data[start : start + size]) for start in range(0, len(data), size)]

    def _find(self, digests: list[bytes], limit: int) -> tuple[int, tuple[Int32, ...]]:
        """Returns the longest cached prefix, of `limit` blocks at most, that every group can go on
        from, and the pages of each with which a sequence does."""
        found = [group.find(digests, limit) for group in self._groups]
        if self._see_all:
            count = min(map(_num_leading, found))
            return count, tuple(one[:count] for one in found)
        ends = [
            can_resume(group.group.spec.visibility, pages != NULL_BLOCK, self._block_size)
            for group, pages in zip(self._groups, found, strict=True)
        ]
        count = int(np.flatnonzero(np.logical_and.reduce(ends))[-1])
        pairs = zip(self._groups, found, strict=True)
        return count, tuple(group.of_hit(one, count) for group, one in pairs)


def _num_leading(pages: Int32) -> int:
    """Returns how many pages there are before the first hole."""
    is_hole = pages == NULL_BLOCK
    first = int(is_hole.argmax())
    return first if is_hole[first] else len(pages)
