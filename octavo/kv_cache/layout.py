"""How pages of different sizes lie in one arena, and what fits. No torch.

Made from the KV groups; read by the planner, the pools of pages and the storage.

The arena is cut into chunks of equal size. Groups whose pages have equal size are a page class, and
a chunk belongs to one class at a time, or to none:

    arena    | chunk 0: class 0      | chunk 1: class 1      | chunk 2: nobody's     |
    pages      0 . 1 . 2 .             2 ...... 3 ......
               ids of class 0          ids of class 1

A page's id times the stride of its class is where it begins in the arena, so that kernels need a
stride and no table. Where all pages have one size, a chunk is a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt, lcm

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.spec import ALIGNMENT, KVGroup

Need = NDArray[np.int64]
"""[classes] pages of each class; [classes, n] at each of n times."""
_MOST_LARGEST_PAGES = 32
"""Of the class with the largest pages, in a chunk."""
_MOST_WASTE = 0.1
"""Share of a chunk that a class may leave between its pages where another cut would leave less."""
_MANY_DIVISORS = 720
_PAGE_PRICE = 1 / 256
"""Share of the memory that may be wasted rather than have a chunk one such page larger: what a
class leaves empty of its chunks nobody else can use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageClass:
    """Groups whose pages have equal size."""

    page_bytes: int
    stride: int
    """Bytes from a page to the next."""
    pages_per_chunk: int
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """Sizes of chunks and of the pages that they are cut into."""

    chunk_bytes: int
    classes: tuple[PageClass, ...]

    @cached_property
    def class_of(self) -> tuple[int, ...]:
        """The page class of every group."""
        pairs = [(g, c) for c, one in enumerate(self.classes) for g in one.groups]
        return tuple(c for _, c in sorted(pairs))

    @cached_property
    def pages_per_chunk(self) -> Need:
        return np.array([one.pages_per_chunk for one in self.classes], np.int64)

    def need(self, pages_of_groups: Sequence[int]) -> Need:
        """Returns what groups need together, from what each of them does."""
        found = np.zeros(len(self.classes), np.int64)
        for page_class, pages in zip(self.class_of, pages_of_groups, strict=True):
            found[page_class] += pages
        return found

    def num_chunks(self, need: Need) -> int:
        """Returns the chunks in which `need` fits, beside the null page."""
        with_null = need.copy()
        with_null[0] += 1
        return int((-(-with_null // self.pages_per_chunk)).sum())


def arena_layout(groups: Sequence[KVGroup], block_size: int) -> ArenaLayout:
    """Returns the layout for pages of so many groups, of `block_size` tokens each."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group.page_bytes(block_size), []).append(index)
    sizes = list(members)
    if len(sizes) == 1:
        chunk_bytes, counts = sizes[0], [1]
    else:
        found = [_cut(sizes, largest) for largest in range(1, _MOST_LARGEST_PAGES + 1)]
        prices = [_waste(sizes, *one) + _PAGE_PRICE * i for i, one in enumerate(found)]
        chunk_bytes, counts = found[int(np.argmin(prices))]
        if _waste(sizes, chunk_bytes, counts) > _MOST_WASTE:
            chunk_bytes, counts = _cut_by_divisors(sizes)
    return ArenaLayout(
        chunk_bytes=chunk_bytes,
        classes=tuple(
            PageClass(
                page_bytes=size,
                stride=chunk_bytes // count,
                pages_per_chunk=count,
                groups=tuple(members[size]),
            )
            for size, count in zip(sizes, counts, strict=True)
        ),
    )


def _cut(sizes: Sequence[int], num_largest: int) -> tuple[int, list[int]]:
    """Returns the bytes of a chunk that holds `num_largest` of the largest pages, and how many of
    each size it holds; every class has its pages at equal distances in it."""
    room = num_largest * max(sizes)
    counts = [room // size for size in sizes]
    unit = ALIGNMENT * lcm(*counts)
    return -(-room // unit) * unit, counts


def _cut_by_divisors(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Returns the same where no common multiple of the counts is near: a chunk with many divisors,
    of which each class takes the largest that leaves its pages room."""
    best, least = None, 2.0
    for num_largest in range(_MOST_LARGEST_PAGES // 2, _MOST_LARGEST_PAGES + 1):
        units = -(-num_largest * max(sizes) // (ALIGNMENT * _MANY_DIVISORS))
        total = units * _MANY_DIVISORS
        small = [d for d in range(1, isqrt(total) + 1) if total % d == 0]
        divisors = [*small, *(total // d for d in small)]
        chunk_bytes = total * ALIGNMENT
        counts = [max(d for d in divisors if chunk_bytes // d >= size) for size in sizes]
        waste = _waste(sizes, chunk_bytes, counts)
        if waste < least:
            best, least = (chunk_bytes, counts), waste
    assert best is not None
    return best


def _waste(sizes: Sequence[int], chunk_bytes: int, counts: Sequence[int]) -> float:
    """Returns the largest share of a chunk that a class leaves between its pages."""
    used = min(size * count for size, count in zip(sizes, counts, strict=True))
    return 1 - used / chunk_bytes
