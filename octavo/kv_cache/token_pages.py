"""Owns what sequences hold of one KV group that keeps something of every token.

Called by the KV cache manager, for one group each; `state_pages` has the same face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.ledger import PageLedger
from octavo.kv_cache.spec import KVGroup
from octavo.step import Int32


class TokenPages:
    """Column j of a row is the page of tokens [j * block_size, (j + 1) * block_size)."""

    def __init__(
        self, group: KVGroup, table: BlockTable, block_size: int, ledger: PageLedger
    ) -> None:
        self.group = group
        self.table = table
        self._index = table.group
        self._block_size = block_size
        self._ledger = ledger
        self._sees_all = group.spec.visibility.most_visible is None

    # -- what it takes -----------------------------------------------------------------------

    def num_missing(self, row: int | None, num_tokens: int, num_cached: int = 0) -> int:
        """Returns the pages that a row lacks to have `num_tokens` tokens; None: a row that begins
        behind `num_cached` cached blocks."""
        there = num_cached if row is None else self.table.lengths[row]
        return max(0, self.group.num_columns(num_tokens, self._block_size) - there)

    def num_left_to_take(self, num_tokens: int, step_tokens: int, cached: Int32) -> int:
        """Returns the pages that a sequence with its `cached` ones will hold beside them, at most
        at one time, until it has `num_tokens` tokens."""
        most = self.group.most_pages(num_tokens, self._block_size, step_tokens)
        return max(0, most - int(np.count_nonzero(cached)))

    # -- prefixes ----------------------------------------------------------------------------

    def may_know(self, first: bytes) -> bool:
        """Whether a prefix may be cached that begins with the block of digest `first`."""
        return not self._sees_all or self._ledger.index.knows(self._index, first)

    def find(self, digests: list[bytes], count: int) -> Int32:
        """Returns the page of each of the first `count` digests, the null page where none is
        cached."""
        return self._ledger.index.find_all(self._index, digests, count)

    def of_hit(self, found: Int32, count: int) -> Int32:
        """Returns the pages with which a sequence goes on behind `count` cached blocks, holes where
        it no longer sees them."""
        cached = found[:count]
        first = min(self.group.first_column(count * self._block_size, self._block_size), count)
        cached[:first] = NULL_BLOCK
        assert (cached[first:] != NULL_BLOCK).all(), "a hit names a block that nobody knows"
        return cached

    def publish(
        self,
        row: int,
        first: int,
        last: int,
        digests: Sequence[bytes],
        contents: Callable[[int, int], list[int]],
        root: bytes,
    ) -> None:
        """Makes the pages of blocks first..last (excluded) findable."""
        pages = self.table.row(row)[max(first - 1, 0) : last].tolist()
        parent = pages.pop(0) if first else NULL_BLOCK
        keys = [BlockKey(self._index, digest) for digest in digests[first : first + len(pages)]]
        self._ledger.publish_all(keys, pages, contents(first, last), root, parent)

    # -- life of a row -----------------------------------------------------------------------

    def admit(self, row: int, cached: Int32) -> None:
        """An empty row begins with cached pages, whose references become its own."""
        self.table.append(row, cached)

    def forget(self, row: int, num_computed: int, kept_from: int | None = None) -> bool:
        """Gives back the pages that no token from `num_computed` on sees, but for those from column
        `kept_from` on; returns whether there are such."""
        if self._sees_all:
            return False
        first = self.group.first_column(num_computed, self._block_size)
        last = first if kept_from is None else min(first, kept_from)
        if last:
            self._ledger.release(self._index, self.table.forget(row, 0, last)[::-1])
        return last < first and bool(self.table.row(row)[last:first].any())

    def extend(self, row: int, count: int) -> None:
        """Takes the pages that it lacks (`num_missing`); they have been reserved."""
        if count:
            after = self.table.last(row)
            self.table.append(row, self._ledger.take(self._index, count, after))

    def grow(self, rows: Int32) -> None:
        """Gives each row, none of which is empty, a page more; they are there."""
        self.table.append_each(rows, self._ledger.take_each(self._index, self.table.lasts(rows)))

    def can_fork(self, parent: int, num_tokens: int, num_computed: int) -> bool:
        """Whether a row can begin with the first `num_tokens` tokens of `parent`, of which
        `num_computed` are computed when the next step begins."""
        pages = self.table.row(parent)[: self.group.num_columns(num_tokens, self._block_size)]
        first = self.group.first_column(num_tokens, self._block_size)
        return NULL_BLOCK not in pages[first:]

    def fork(self, parent: int, row: int, num_tokens: int) -> None:
        """A row begins with the first `num_tokens` tokens of `parent` and room for one more: full
        pages are shared, the one that is written next is copied."""
        full, tail = divmod(num_tokens, self._block_size)
        pages = self.table.row(parent)
        shared = pages[:full].copy()
        self._ledger.acquire(self._index, shared, is_hit=False)
        own = self._ledger.take(self._index, 1)
        if tail:
            self._ledger.copy(self._index, int(pages[full]), own[0])
        self.table.append(row, shared.tolist() + own)

    def save(self, row: int, end: int) -> None:
        """Does nothing: what is computed of a token stays as it is."""

    def release(self, rows: Sequence[int]) -> None:
        """Gives back all pages of rows, the last one of each first."""
        self._ledger.release(self._index, self.table.clear(rows))

    # -- checks ------------------------------------------------------------------------------

    def held(self, row: int) -> list[int]:
        """Returns the pages that a row references."""
        return self.table.row(row).tolist()

    def written(self, row: int, num_computed: int) -> list[int]:
        """Returns the pages that a row has yet to write to."""
        return self.table.row(row)[num_computed // self._block_size :].tolist()
