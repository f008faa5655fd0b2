"""Owns the pages that nobody uses and that hold no prefix: which of them to hand out.

Called by the block pool alone. Never counts references.

Pages are handed out so that what is computed together lies together. A page behind the sequence's
last one is always best. Else a sequence begins at a stretch of whole free regions: a prompt in the
shortest stretch that holds it, so that long ones stay; one that grows page by page where most room
is behind it. Only when no region is whole are pages taken from those that others may grow into.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.step import Int32

REGION = 8
"""Pages; regions are aligned. So much is read or copied at once at the least."""
_REGIONS_IN_EXTENT = 16
EXTENT = REGION * _REGIONS_IN_EXTENT
"""Pages: 2,048 tokens in pages of 16."""
_FEW = 8 * REGION
"""Pages in a row that are sooner taken out region by region than by arrays."""
_WHOLE = bytes([REGION])
_ONES, _HIGHEST = np.uint64(0x0101010101010101), np.uint64(56)


class Stretch(NamedTuple):
    """Whole free regions in a row."""

    region: int
    length: int


class FreePages:
    """A set of page ids below `num_pages`; empty at first."""

    def __init__(self, num_pages: int) -> None:
        num_extents = -(-num_pages // EXTENT)
        # Bytes and not NumPy arrays alone: a growing sequence asks for one page, which is several
        # times faster so. The arrays are views of the same memory.
        self._free = bytearray(num_extents * EXTENT)
        self._counts = bytearray(num_extents * _REGIONS_IN_EXTENT)
        self._is_free = np.frombuffer(self._free, np.bool_)
        self._regions = np.frombuffer(self._free, np.uint64)
        """[regions] a byte a page: 1 if it is here."""
        self._in_region = np.frombuffer(self._counts, np.uint8)
        self._whole_in_extent = np.zeros(num_extents, np.uint8)
        self._length = 0
        self.num_whole = 0
        """Regions of which every page is here."""

    def __len__(self) -> int:
        return self._length

    def __contains__(self, page: int) -> bool:
        return bool(self._free[page])

    def all(self) -> Int32:
        return np.flatnonzero(self._is_free).astype(np.int32)

    def would_be_whole(self, pages: Int32) -> NDArray[np.bool_]:
        """Returns, for each of `pages`, which are not here, whether its region were whole if all of
        them were."""
        regions = pages // REGION
        counts = np.bincount(regions, minlength=len(self._in_region)) + self._in_region
        return counts[regions] == REGION

    def add(self, pages: Int32) -> None:
        """Takes in pages that are not here."""
        if not len(pages):
            return
        self._length += len(pages)
        if len(pages) <= REGION:
            self._add_few(pages.tolist())
            return
        self._is_free[pages] = True
        self._recount(pages)

    def _add_few(self, pages: list[int]) -> None:
        """As `add`, several times faster than arrays."""
        free, counts = self._free, self._counts
        for page in pages:
            region = page // REGION
            free[page] = 1
            counts[region] += 1
            if counts[region] == REGION:
                self._whole_in_extent[region // _REGIONS_IN_EXTENT] += 1
                self.num_whole += 1

    def remove(self, pages: Int32) -> None:
        """Takes out pages that are here."""
        self._is_free[pages] = False
        self._length -= len(pages)
        self._recount(pages)

    def _recount(self, pages: Int32) -> None:
        """Counts the regions and extents of `pages` anew."""
        regions = pages // REGION
        # The bytes of a word are 0 or 1: this product has their sum in its highest byte.
        self._in_region[regions] = self._regions[regions] * _ONES >> _HIGHEST
        extents = regions // _REGIONS_IN_EXTENT
        counts = self._in_region.reshape(-1, _REGIONS_IN_EXTENT)[extents]
        self._whole_in_extent[extents] = (counts == REGION).sum(axis=1, dtype=np.uint8)
        self.num_whole = int(self._whole_in_extent.sum(dtype=np.int64))

    def _remove_range(self, first: int, last: int) -> None:
        """Takes out a few pages in a row, which are here, several times faster than `remove`."""
        self._length -= last - first
        while first < last:
            region = first // REGION
            end = min(last, (region + 1) * REGION)
            self._free[first:end] = bytes(end - first)
            if self._counts[region] == REGION:
                self._whole_in_extent[region // _REGIONS_IN_EXTENT] -= 1
                self.num_whole -= 1
            self._counts[region] -= end - first
            first = end

    def take_behind(self, page: int, count: int) -> list[int]:
        """Takes out the pages that follow `page` without a gap, `count` at most."""
        first = page + 1
        last = self._free.find(0, first, first + count)
        last = min(first + count, len(self._free)) if last < 0 else last
        taken = list(range(first, last))
        if len(taken) <= _FEW:
            self._remove_range(first, last)
        else:
            self.remove(np.arange(first, last, dtype=np.int32))
        return taken

    def take_behind_each(self, pages: Int32) -> Int32:
        """Takes out the page behind each of `pages`, where it is here and no other one's; returns
        them, 0 for the others."""
        behind = np.minimum(pages + 1, len(self._is_free) - 1)
        is_here = self._is_free[behind] & (behind > pages)
        taken, counts = np.unique(behind[is_here], return_counts=True)
        if (counts > 1).any():
            is_here &= ~np.isin(behind, taken[counts > 1])
        behind[~is_here] = 0
        self.remove(behind[is_here])
        return behind

    def take(self, count: int, *, is_growing: bool) -> list[int]:
        """Takes out `count` pages, which must be here, in as few stretches as may be.

        `is_growing`: more are asked for soon, and should find room behind the last one.
        """
        assert count <= self._length, "take more than is free"
        taken: list[int] = []
        if count >= REGION:
            taken = self._take_stretches(count)
        elif count and self.num_whole:
            stretch = self._room_to_grow() if is_growing else self._snug()
            taken = self.take_behind(stretch.region * REGION - 1, count)
        return taken + self._take_from_parts(count - len(taken))

    def _take_stretches(self, count: int) -> list[int]:
        """Takes out up to `count` pages of whole regions: of the shortest stretch that has them
        all, else of the longest ones."""
        starts, lengths = _stretches(self._in_region == REGION)
        wanted = -(-count // REGION)
        fits = np.flatnonzero(lengths >= wanted)
        if len(fits):
            chosen = fits[lengths[fits].argmin()][None]
        else:
            chosen = np.argsort(-lengths, kind="stable")
            num = int(np.searchsorted(np.cumsum(lengths[chosen]), wanted)) + 1
            chosen = chosen[:num]
        pages = _ranges(starts[chosen] * REGION, lengths[chosen] * REGION)[:count]
        self.remove(pages)
        return pages.tolist()

    def _room_to_grow(self) -> Stretch:
        """Returns the later half of a longest stretch in an extent with most whole regions: who
        grows before it keeps room too."""
        extent = int(self._whole_in_extent.argmax())
        found = max(self._in_extent(extent), key=lambda stretch: stretch.length)
        skipped = found.length // 2
        return Stretch(found.region + skipped, found.length - skipped)

    def _snug(self) -> Stretch:
        """Returns a shortest stretch in an extent with fewest whole regions."""
        whole = self._whole_in_extent
        extent = int(np.where(whole == 0, _REGIONS_IN_EXTENT + 1, whole).argmin())
        return min(self._in_extent(extent), key=lambda stretch: stretch.length)

    def _in_extent(self, extent: int) -> list[Stretch]:
        first = extent * _REGIONS_IN_EXTENT
        counts = self._counts[first : first + _REGIONS_IN_EXTENT]
        found, at = [], counts.find(REGION)
        while at >= 0:
            length = 1
            while counts[at + length : at + length + 1] == _WHOLE:
                length += 1
            found.append(Stretch(first + at, length))
            at = counts.find(REGION, at + length)
        return found

    def _take_from_parts(self, count: int) -> list[int]:
        """Takes out `count` pages while no region is whole: from those that have most."""
        taken: list[int] = []
        while len(taken) < count:
            at = -1
            for most in range(REGION - 1, 0, -1):
                at = self._counts.find(most)
                if at >= 0:
                    break
            page = at * REGION - 1
            for _ in range(min(self._counts[at], count - len(taken))):
                page = self._free.find(1, page + 1)
                self._remove_range(page, page + 1)
                taken.append(page)
        return taken

    def check(self) -> None:
        """Raises AssertionError if the counts are not those of the pages."""
        counts = self._is_free.reshape(-1, _REGIONS_IN_EXTENT, REGION).sum(axis=2)
        assert (self._in_region.reshape(counts.shape) == counts).all()
        assert (self._whole_in_extent == (counts == REGION).sum(axis=1)).all()
        assert self.num_whole == (counts == REGION).sum()
        assert self._length == counts.sum()


def _stretches(is_set: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns where each stretch of True begins, and its length."""
    edges = np.flatnonzero(is_set[1:] != is_set[:-1]) + 1
    if is_set[0]:
        edges = np.concatenate(([0], edges))
    if is_set[-1]:
        edges = np.concatenate((edges, [len(is_set)]))
    return edges[::2], edges[1::2] - edges[::2]


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Int32:
    """Returns start, start + 1, ... of each, `length` numbers, one after the other."""
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1] if len(ends) else 0)
    return (places + np.repeat(starts - ends + lengths, lengths)).astype(np.int32)
