"""A block pool for each page class, over one pool of chunks.

Called by the KV cache manager and its groups. Knows neither tokens nor sequences.

What a class can use is its pages that nobody references and the chunks that are nobody's; a chunk
of another class none of whose pages is referenced is as good as nobody's, and costs the prefixes
that are cached in it. `reserve` moves chunks so that the pages which it is asked for can then be
allocated one group after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey, BlockPool
from octavo.kv_cache.chunk_pool import ChunkPool
from octavo.kv_cache.layout import ArenaLayout, Need
from octavo.step import Bool, Int32


@dataclass(frozen=True, slots=True)
class Room:
    """Pages that could be allocated, in all classes."""

    loose: Need
    """[classes] pages in chunks that their class cannot do without."""
    spare_chunks: int
    """Chunks that any class could have."""
    pages_per_chunk: Need

    def fits(self, need: Need) -> bool:
        """Whether the pages of every class are there, at each of the times if there are several."""
        loose, per_chunk = self.loose, self.pages_per_chunk
        if need.ndim > 1:
            loose, per_chunk = loose[:, None], per_chunk[:, None]
        if not self.spare_chunks:  # pages of one size: most models, several times a request
            return bool((need <= loose).all())
        chunks = -(-np.maximum(need - loose, 0) // per_chunk)
        return bool((chunks.sum(axis=0) <= self.spare_chunks).all())


class PagePools:
    """Page ids are those of a class; class 0 owns the first chunk, and with it the null page."""

    def __init__(self, layout: ArenaLayout, num_chunks: int) -> None:
        self.layout = layout
        self.chunks = ChunkPool(num_chunks)
        self._per_chunk = layout.pages_per_chunk
        self.pools = tuple(BlockPool(num_chunks * one.pages_per_chunk) for one in layout.classes)
        self.only = self.pools[0] if len(self.pools) == 1 else None
        """The pool of all pages, where they have one size."""
        if len(self.pools) == 1:
            self.chunks.take(0, num_chunks)
            return
        self.chunks.take(0, 1)
        for index, pool in enumerate(self.pools):
            first = int(self._per_chunk[0]) if index == 0 else 1
            pool.withdraw(np.arange(first, pool.num_blocks, dtype=np.int32))

    def was_evicted(self, digest: bytes) -> bool:
        """Whether a page with the prefix `digest` was evicted lately."""
        return any(pool.was_evicted(digest) for pool in self.pools)

    # -- figures -----------------------------------------------------------------------------

    @property
    def referenced(self) -> Need:
        """[classes] pages that somebody holds."""
        return np.array([pool.num_referenced for pool in self.pools], np.int64)

    @property
    def num_referenced(self) -> int:
        return sum(pool.num_referenced for pool in self.pools)

    @property
    def num_cached(self) -> int:
        """Pages that nobody references and that still hold a known prefix."""
        return sum(pool.num_cached for pool in self.pools)

    @property
    def num_pages(self) -> int:
        """Pages there are; those that nobody's chunks would have if the first class took them."""
        owned = sum(pool.num_referenced + pool.num_free for pool in self.pools)
        return owned + self.chunks.num_free * int(self._per_chunk[0])

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that are referenced."""
        pairs = zip(self.pools, self.layout.classes, strict=True)
        return sum(pool.num_referenced * one.stride for pool, one in pairs)

    # -- room --------------------------------------------------------------------------------

    def room(self, taken: Sequence[Iterable[Int32]] = ()) -> Room:
        """Returns what could be allocated if the pages `taken` (by class; null pages do not count)
        were in use too."""
        if self.only is not None:
            reused = sum(map(self.only.num_unreferenced, taken[0])) if taken else 0
            return Room(np.array([self.only.num_free - reused]), 0, self._per_chunk)
        loose = np.zeros(len(self.pools), np.int64)
        spare = self.chunks.num_free
        for index in range(len(self.pools)):
            is_unused = self._is_unused(index, taken[index] if taken else ())
            whole = is_unused.all(axis=1) & self.chunks.is_owned(index)
            loose[index] = np.count_nonzero(is_unused[~whole])
            spare += np.count_nonzero(whole)
        return Room(loose, int(spare), self._per_chunk)

    def _is_unused(self, index: int, taken: Iterable[Int32] = ()) -> Bool:
        """Returns [chunks, pages]: which pages of a class it has, and nobody references."""
        found = self.pools[index].is_unreferenced()
        for pages in taken:
            found[pages] = False
        return found.reshape(-1, int(self._per_chunk[index]))

    def reserve(self, need: Need) -> list[BlockKey] | None:
        """Sees to it that `need` can be allocated; returns the keys that it cost, or None, with
        nothing changed, if there is too little."""
        if self.only is not None:
            return [] if need[0] <= self.only.num_free else None
        free = np.array([pool.num_free - pool.num_cached for pool in self.pools])
        if (need <= free).all():
            return []
        room = self.room()
        if not room.fits(need):
            return None
        evicted = self._move_chunks(-(-np.maximum(need - room.loose, 0) // self._per_chunk))
        self._spread(need)
        return evicted

    def _move_chunks(self, wanted: Need) -> list[BlockKey]:
        """Gives every class so many chunks of which no page is in use; those that have more give
        them up, once there are none of nobody's left."""
        unused = [self._whole_chunks(index) for index in range(len(self.pools))]
        evicted: list[BlockKey] = []
        for index, chunks in enumerate(unused):
            missing = int(wanted[index]) - len(chunks)
            for donor, others in enumerate(unused):
                short = missing - self.chunks.num_free
                surplus = len(others) - int(wanted[donor])
                if short > 0 and surplus > 0:
                    given, unused[donor] = np.split(others, [min(short, surplus)])
                    evicted += self._withdraw(donor, given)
            if missing > 0:
                self._restore(index, missing)
        return evicted

    def _whole_chunks(self, index: int) -> Int32:
        """Returns a class's chunks of which no page is in use, those first that cost fewest cached
        prefixes."""
        is_whole = self._is_unused(index).all(axis=1) & self.chunks.is_owned(index)
        chunks = np.flatnonzero(is_whole).astype(np.int32)
        keyed = self.pools[index].is_keyed().reshape(-1, int(self._per_chunk[index]))
        return chunks[np.argsort(keyed[chunks].sum(axis=1), kind="stable")]

    def _spread(self, need: Need) -> None:
        """Lets classes have chunks of nobody's rather than evict what they have cached."""
        for index, pool in enumerate(self.pools):
            missing = int(need[index]) - (pool.num_free - pool.num_cached)
            count = min(-(-missing // int(self._per_chunk[index])), self.chunks.num_free)
            if count > 0:
                self._restore(index, count)

    def _withdraw(self, index: int, chunks: Int32) -> list[BlockKey]:
        self.chunks.give_back(index, chunks)
        return self.pools[index].withdraw(self._pages(index, chunks))

    def _restore(self, index: int, count: int) -> None:
        chunks = self.chunks.take(index, count)
        self.pools[index].restore(self._pages(index, chunks))

    def _pages(self, index: int, chunks: Int32) -> Int32:
        count = int(self._per_chunk[index])
        return (chunks[:, None] * count + np.arange(count, dtype=np.int32)).reshape(-1)

    def check(self) -> None:
        """Raises AssertionError if a page is of a chunk that its class does not own, or a pool
        contradicts itself."""
        for index, pool in enumerate(self.pools):
            pool.check()
            if len(self.pools) > 1:
                pages = pool.is_here().reshape(len(self.chunks), -1)
                owned = self.chunks.is_owned(index)
                expected = np.repeat(owned, pages.shape[1])
                expected[NULL_BLOCK] = pages.reshape(-1)[NULL_BLOCK]
                assert (pages.reshape(-1) == expected).all(), f"class {index} has foreign pages"
