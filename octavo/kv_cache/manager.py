"""Gives sequences their KV pages: pools, prefix index and the groups' tables behind one face.

Called by the scheduler alone. Never touches a tensor: what must happen to memory (copies, saves,
table deltas, poison) is collected here and travels in the next step plan.

How many pages something takes is asked of the groups, in `Need`s: numbers by page class that nobody
else looks into.

Side effects of a sequence's life, in order:
    lookup    none; tells how many leading blocks are cached, or that another sequence is
              computing the next one
    admit     takes a row: cached pages are referenced, never copied (but for states)
    allocate  frees what no later token sees and others can find, then appends pages
    save      keeps the states that the next step leaves
    publish   full computed blocks get their key; who waits for them can have them
    release   references go back, last page first
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from octavo.kv_cache.announced import Announced
from octavo.kv_cache.block_pool import NULL_BLOCK
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.layout import Need, arena_layout
from octavo.kv_cache.ledger import PageLedger
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.page_pools import PagePools, Room
from octavo.kv_cache.prefix_index import PrefixIndex
from octavo.kv_cache.prefixes import Prefixes
from octavo.kv_cache.records import Demand, KVRows, PrefixHit, SequenceKV
from octavo.kv_cache.spec import KVGroup
from octavo.kv_cache.state_pages import StatePages
from octavo.kv_cache.token_pages import TokenPages
from octavo.step import Int32, Page, PageCopy, TableDelta
from octavo.visibility import State


class KVCacheManager:
    """Pages of all groups come from one arena; a row is one sequence in every group."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        *,
        num_chunks: int,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        poison: bool = False,
        news: CacheNews | None = None,
    ) -> None:
        """`num_chunks` of `arena_layout(groups)`: pages, where all groups' have one size; `news` is
        told what others can find."""
        self.block_size = block_size
        self.layout = arena_layout(groups, block_size)
        self._news, self.has_news = news, news is not None
        self._ledger = PageLedger(self.layout, num_chunks, poison=poison, news=news)
        self._groups: list[TokenPages | StatePages] = []
        for index, group in enumerate(groups):
            columns = group.num_columns(max_model_len, block_size) + (not group.is_state)
            table = BlockTable(index, max_rows, columns)
            kind = StatePages if group.is_state else TokenPages
            self._groups.append(kind(group, table, block_size, self._ledger))
        states = (group.spec.visibility for group in groups)
        self._save_every = min((one.every for one in states if isinstance(one, State)), default=0)
        self._has_bounds = any(g.spec.visibility.most_visible is not None for g in groups)
        self._no_pages: tuple[Int32, ...] = tuple(np.zeros(0, np.int32) for _ in groups)
        self._announced = Announced()
        self._prefixes = Prefixes(self._groups, self._ledger, self._announced, block_size)
        self.rows = KVRows(max_rows)

    @property
    def pools(self) -> PagePools:
        return self._ledger.pools

    @property
    def index(self) -> PrefixIndex:
        return self._ledger.index

    @property
    def tables(self) -> tuple[BlockTable, ...]:
        return tuple(group.table for group in self._groups)

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        return tuple(group.group for group in self._groups)

    @property
    def has_states(self) -> bool:
        """Whether a group keeps states, which only exist where a step ended."""
        return self._save_every > 0

    # -- what fits ---------------------------------------------------------------------------

    def need(self, num_tokens: int, step_tokens: int, hit: PrefixHit | None = None) -> Need:
        """Returns what a sequence of `num_tokens` will hold beside the pages of `hit`, at most at
        one time, if it is computed at most `step_tokens` at a step."""
        cached = hit.pages if hit else self._no_pages
        pairs = zip(self._groups, cached, strict=True)
        return self.layout.need(
            [group.num_left_to_take(num_tokens, step_tokens, pages) for group, pages in pairs]
        )

    def demands(self, step_tokens: int) -> tuple[Demand, ...]:
        """Returns how groups grow with a sequence (see Forecast)."""
        found = Counter(
            (page_class, group.most_pages_ever(self.block_size, step_tokens), group.is_state)
            for page_class, group in zip(self.layout.class_of, self.groups, strict=True)
        )
        return tuple(
            Demand(page_class, most_pages, count, is_constant)
            for (page_class, most_pages, is_constant), count in found.items()
        )

    def room(self, hit: PrefixHit) -> Room:
        """Returns what could be allocated beside the pages that `hit` would take into use."""
        taken: list[list[Int32]] = [[] for _ in self.layout.classes]
        for page_class, pages in zip(self.layout.class_of, hit.pages, strict=True):
            taken[page_class].append(pages)
        return self.pools.room(taken)

    def _reserve(self, pages: list[int]) -> bool:
        """Sees to it that every group can take so many pages; False if there are too few."""
        if self.pools.only is not None:  # most models, at every new block
            return sum(pages) <= self.pools.only.num_free
        return self._reserve_need(self.layout.need(pages))

    def _reserve_need(self, need: Need) -> bool:
        evicted = self.pools.reserve(need)
        if evicted is None:
            return False
        self._ledger.forget(evicted)
        return True

    def claim(self, kv: SequenceKV, num_tokens: int, step_tokens: int) -> bool:
        """Gives every page class the chunks that `kv` takes at most until it has `num_tokens`, of
        which at most `step_tokens` are computed at a step.

        While nobody else has pages, none of its reservations moves a chunk then, and none fails.
        Returns False, with nothing changed, if there are too few chunks."""
        kv.has_claim = self._reserve_need(self.need(num_tokens, step_tokens))
        return kv.has_claim

    # -- prefix ------------------------------------------------------------------------------

    def lookup(self, kv: SequenceKV, token_ids: array[int]) -> PrefixHit:
        """Returns what is cached of `token_ids`; the last token is always left to compute.

        What it names is there until pages are allocated or freed."""
        return self._prefixes.lookup(kv, token_ids)

    def without(self, hit: PrefixHit) -> PrefixHit:
        """Returns what remains of a hit that is not taken over."""
        return PrefixHit(0, False, hit.miss_reason, self._no_pages)

    # -- life of a sequence ------------------------------------------------------------------

    def admit(self, kv: SequenceKV, row: int, hit: PrefixHit, num_tokens: int) -> bool:
        """Gives `kv` the empty row with its cached pages and room for `num_tokens` tokens.

        Returns False, with nothing changed, if there are too few pages.
        """
        missing = [g.num_missing(None, num_tokens, hit.num_blocks) for g in self._groups]
        if hit.num_blocks and not self.room(hit).fits(self.layout.need(missing)):
            return False
        for group, pages in zip(self._groups, hit.pages, strict=True):
            self._ledger.acquire(group.table.group, pages)
        if not self._reserve(missing):
            assert not hit.num_blocks, "what fits cannot be had"
            return False
        for group, pages in zip(self._groups, hit.pages, strict=True):
            group.admit(row, pages)
            group.extend(row, group.num_missing(row, num_tokens))
        kv.row = row
        kv.num_published = hit.num_blocks
        kv.capacity = -(-num_tokens // self.block_size) * self.block_size
        self.rows.write(kv)
        self._announced.announce(kv)
        return True

    def allocate(self, kv: SequenceKV, num_computed: int, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens of which `num_computed` are computed.

        Returns False, with no page taken, if there are too few: then let others `give_way`.
        """
        assert kv.row is not None
        if self._has_bounds:
            self._forget(kv, num_computed, self._kept_from(kv))
        missing = [group.num_missing(kv.row, num_tokens) for group in self._groups]
        if not self._reserve(missing):
            return False
        for group, count in zip(self._groups, missing, strict=True):
            group.extend(kv.row, count)
        kv.capacity = -(-num_tokens // self.block_size) * self.block_size
        self.rows.capacity[kv.row] = kv.capacity
        return True

    def grow(self, kvs: Sequence[SequenceKV]) -> bool:
        """Gives each room for a block more, which all lack; returns False, with nothing done, where
        each must be asked for itself: too little is free, or groups are not alike."""
        pool, num_pages = self.pools.only, len(kvs) * len(self._groups)
        if pool is None or self._has_bounds or self.has_states or num_pages > pool.num_free:
            return False
        rows = np.array([kv.row for kv in kvs if kv.row is not None], np.int32)
        for group in self._groups:
            group.grow(rows)
        for kv in kvs:
            kv.capacity += self.block_size
        self.rows.capacity[rows] += self.block_size
        return True

    @property
    def has_bounds(self) -> bool:
        """Whether some layers see only so far back: then `passes` has something to do."""
        return self._has_bounds

    def passes(self, kv: SequenceKV, num_computed: int) -> None:
        """The next step begins behind `num_computed` tokens: gives back what none of them sees any
        more, where that is a block and more. What the step under way computes stays until others
        can find it, if nobody lacks room."""
        if self._has_bounds and num_computed - kv.seen_from >= self.block_size:
            self._forget(kv, num_computed, self._kept_from(kv))

    def give_way(self, kv: SequenceKV) -> bool:
        """Gives back what is only there for others to find; returns whether there was any."""
        if not kv.kept_behind:
            return False
        self._forget(kv, kv.kept_behind, None)
        return True

    def _kept_from(self, kv: SequenceKV) -> int | None:
        """Returns the first block that stays though no token sees it any more, if one does."""
        return kv.num_published if kv.writes_cache and not kv.has_claim else None

    def _forget(self, kv: SequenceKV, num_computed: int, kept_from: int | None) -> None:
        assert kv.row is not None
        keeps = [group.forget(kv.row, num_computed, kept_from) for group in self._groups]
        if kept_from is not None and any(keeps):
            kv.seen_from, kv.kept_behind = kept_from * self.block_size, num_computed
        else:
            kv.seen_from, kv.kept_behind = num_computed, 0
        self.rows.write(kv)

    def fork(
        self, parent: SequenceKV, child: SequenceKV, row: int, num_tokens: int, num_computed: int
    ) -> bool:
        """Gives `child` the first `num_tokens` computed tokens of `parent` and room for one more;
        `num_computed` tokens of the parent are computed when the next step begins.

        Full blocks are shared; the block that the child writes next, and states, are copied.
        Returns False, with nothing changed, if that is impossible: no free page, or the parent
        no longer has what the child must see.
        """
        assert parent.row is not None
        if not all(g.can_fork(parent.row, num_tokens, num_computed) for g in self._groups):
            return False
        if not self._reserve([1] * len(self._groups)):
            return False
        for group in self._groups:
            group.fork(parent.row, row, num_tokens)
        full = num_tokens // self.block_size
        child.row = row
        child.capacity = (full + 1) * self.block_size
        child.digests = parent.digests[:full]
        child.num_published = min(parent.num_published, full)
        self.rows.write(child)
        return True

    def chunk_end(self, kv: SequenceKV, start: int, end: int, stops: Sequence[int]) -> int:
        """Returns where a chunk from `start` that may reach to `end` should end, so that the states
        it leaves can be kept: at the first of `stops`, else with a block if it reaches one.
        """
        if not self.has_states:
            return end
        stop = next((one for one in stops if start < one <= end), None)
        if stop is not None:
            return stop
        whole = end // self.block_size * self.block_size
        return whole if whole > start else end

    def save(self, kv: SequenceKV, start: int, end: int) -> None:
        """The next step computes tokens start..end (excluded): keeps the states behind them, if
        others may begin there and there is room to spare."""
        is_wanted = end % self.block_size == 0 and (end - start > 1 or end % self._save_every == 0)
        if kv.row is None or not kv.writes_cache or kv.has_claim or not is_wanted:
            return
        if self._reserve([int(group.group.is_state) for group in self._groups]):
            for group in self._groups:
                group.save(kv.row, end)

    def digest(self, kv: SequenceKV, token_ids: array[int]) -> None:
        """Makes what `publish` will want, and `lookup` may have left, beforehand."""
        if kv.writes_cache:
            self._prefixes.digest(kv, token_ids)

    def publish(self, kv: SequenceKV, token_ids: array[int], num_computed: int) -> None:
        """Makes the full blocks among the first `num_computed` tokens findable by others."""
        last = min(num_computed, len(token_ids)) // self.block_size
        if kv.row is None or not kv.writes_cache or last <= kv.num_published:
            return
        self._prefixes.digest(kv, token_ids)
        first, contents = kv.num_published, partial(self._prefixes.contents, token_ids)
        for group in self._groups:
            group.publish(kv.row, first, last, kv.digests, contents, kv.root)
            if self._news is not None:
                self._news.store(group.table.group, kv, first, last, token_ids)
        kv.num_published = last
        self.rows.num_published[kv.row] = last
        self._announced.announce(kv)

    def release(self, kvs: Sequence[SequenceKV]) -> None:
        """Gives back all pages and rows of some; the prefixes stay findable until evicted."""
        rows = [kv.row for kv in kvs if kv.row is not None]
        if rows:
            for group in self._groups:
                group.release(rows)
        for kv in kvs:
            self._announced.retract(kv)
            kv.row = None
            kv.num_published = kv.capacity = kv.seen_from = kv.kept_behind = 0
            kv.has_claim = False

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; returns False, forgetting none, while a sequence holds
        pages."""
        if self.pools.num_referenced:
            return False
        self._ledger.reset()
        return True

    # -- for the next step plan --------------------------------------------------------------

    def take_emptied(self) -> tuple[Page, ...]:
        return self._ledger.take_emptied()

    def take_copies(self) -> tuple[PageCopy, ...]:
        return self._ledger.take_copies()

    def take_saves(self) -> tuple[PageCopy, ...]:
        return self._ledger.take_saves()

    def take_deltas(self) -> tuple[TableDelta, ...]:
        deltas = (group.table.take_delta() for group in self._groups)
        return tuple(delta for delta in deltas if delta is not None)

    # -- checks ------------------------------------------------------------------------------

    def check_writable(self, kv: SequenceKV, num_computed: int) -> None:
        """Raises AssertionError if a page that `kv` has yet to write is shared or published."""
        assert kv.row is not None
        self.rows.check(kv)
        for group in self._groups:
            pool = self._ledger.pool(group.table.group)
            for page in group.written(kv.row, num_computed):
                assert pool.is_writable(page), f"page {page} would be written by two"

    def check(self, rows: Sequence[int]) -> None:
        """Raises AssertionError unless reference counts equal what `rows` hold, keys and index
        agree, and no other row holds a page."""
        self.pools.check()
        counts = [np.zeros(pool.num_blocks, np.int64) for pool in self.pools.pools]
        for page_class, group in zip(self.layout.class_of, self._groups, strict=True):
            for row, length in enumerate(group.table.lengths):
                assert row in rows or length == 0, f"row {row} was not cleared"
            for row in rows:
                np.add.at(counts[page_class], group.held(row), 1)
        published = dict(self.index.items())
        class_of = self.layout.class_of
        for page_class, (pool, count) in enumerate(zip(self.pools.pools, counts, strict=True)):
            keys = {k: p for k, p in published.items() if class_of[k.group] == page_class}
            assert len(set(keys.values())) == len(keys)
            for page in np.flatnonzero(pool.is_here()).tolist():
                if page != NULL_BLOCK:
                    assert count[page] == pool.ref_count(page), f"page {page} leaks"
                    key = pool.key(page)
                    assert key is None or keys.get(key) == page, f"page {page} lost its key"
            assert all(pool.key(page) == key for key, page in keys.items())
