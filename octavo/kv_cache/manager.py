"""Gives sequences their KV blocks: pool, prefix index and block tables behind one face.

Called by the scheduler alone. Never touches a tensor: what must happen to memory (copies,
table deltas, poison) is collected here and travels in the next step plan.

Side effects of a sequence's life, in order:
    lookup    none; tells how many leading blocks are cached, or that another sequence is
              computing the next one
    admit     takes a row's table: cached blocks are referenced, never copied
    allocate  frees what fell behind a window, then appends blocks
    publish   full computed blocks get their key; who waits for them can have them
    release   references go back, last block first
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey, BlockPool
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.planner import blocks_of_sequence
from octavo.kv_cache.prefix_index import Digester, PrefixIndex
from octavo.kv_cache.resume import can_resume
from octavo.kv_cache.runs import share_in_runs
from octavo.kv_cache.spec import KVGroup
from octavo.observe.stats import MissReason
from octavo.step import Int32, TableDelta


@dataclass(slots=True)
class SequenceKV:
    """The KV side of one sequence; changed by the manager only."""

    root: bytes
    """Parent digest of its first block (see prefix_root)."""
    reads_cache: bool = True
    writes_cache: bool = True
    prompt_blocks: int = 0
    """Full blocks of the prompt: those another sequence may wait for."""
    row: int | None = None
    digests: list[bytes] = field(default_factory=list)
    num_published: int = 0
    capacity: int = 0
    """Tokens that fit in its blocks."""
    computing: bytes | None = None
    """Digest of its next unpublished prompt block, on which others may wait."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What of a sequence's known tokens is cached."""

    num_blocks: int
    is_computing: bool
    """The next block is being computed by a running sequence: wait instead of computing it."""
    miss_reason: MissReason | None
    """Why the next block is missing; None if all full blocks were found."""
    blocks: tuple[Int32, ...] = ()
    """The cached blocks of every group, holes where its window no longer sees."""
    num_reused: int = 0
    """Those that nobody references yet: taking them leaves as many fewer free."""


NO_HIT = PrefixHit(0, False, None)


class KVCacheManager:
    """Blocks of all groups come from one pool; a row is one sequence in every group's table."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        poison: bool = False,
    ) -> None:
        self.block_size = block_size
        self._groups = tuple(groups)
        self.pool = BlockPool(num_blocks)
        self.index = PrefixIndex(len(groups))
        self._digester = Digester()
        columns = -(-max_model_len // block_size) + 1
        self.tables = tuple(BlockTable(g, max_rows, columns) for g in range(len(groups)))
        self._visibilities = tuple(group.spec.visibility for group in groups)
        self._computing: dict[bytes, int] = {}
        self._copies: list[tuple[int, int]] = []
        self._poison = poison
        self._emptied: list[int] = []

    # -- what fits ---------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int, step_tokens: int) -> int:
        """Returns the blocks that a sequence of `num_tokens` holds at most at one time, if it is
        computed at most `step_tokens` at a step."""
        return blocks_of_sequence(self._groups, num_tokens, self.block_size, step_tokens)

    def room(self, hit: PrefixHit) -> int:
        """Returns the blocks that are free beside those that `hit` would take into use."""
        return self.pool.num_free - hit.num_reused

    @property
    def run_share(self) -> float:
        """Share of the blocks of long sequences that lie in runs (see share_in_runs)."""
        rows = (table.row(row) for table in self.tables for row in range(len(table.lengths)))
        return share_in_runs(rows, self.block_size)

    # -- prefix ------------------------------------------------------------------------------

    def lookup(self, kv: SequenceKV, token_ids: array[int]) -> PrefixHit:
        """Returns what is cached of `token_ids`; the last token is always left to compute.

        What it names is there until blocks are allocated or freed."""
        limit = (len(token_ids) - 1) // self.block_size
        if not kv.reads_cache:
            return NO_HIT
        if limit == 0:
            return PrefixHit(0, False, "too_short")
        self._digester.extend(kv.digests, kv.root, token_ids, self.block_size)
        digests = kv.digests[:limit]
        found = [self.index.find_all(group, digests) for group in range(len(self.tables))]
        count = self._num_leading(found)
        reason, is_computing = None, False
        if count < limit:
            missing = digests[count]
            reason = self.index.miss_reason(missing, self._content(token_ids, count), kv.root)
            is_computing = missing in self._computing
        blocks = tuple(self._visible(group, one[:count]) for group, one in enumerate(found))
        num_reused = sum(map(self.pool.num_unreferenced, blocks))
        return PrefixHit(count, is_computing, reason, blocks, num_reused)

    def _num_leading(self, found: list[Int32]) -> int:
        """Returns the longest cached prefix in blocks that every group can go on from; `found` has
        each group's blocks, the null block where none is known."""
        ends = [
            can_resume(visibility, blocks != NULL_BLOCK, self.block_size)
            for blocks, visibility in zip(found, self._visibilities, strict=True)
        ]
        return int(np.flatnonzero(np.logical_and.reduce(ends))[-1])

    def _content(self, token_ids: array[int], block: int) -> int:
        first = block * self.block_size
        return hash(token_ids[first : first + self.block_size].tobytes())

    # -- life of a sequence ------------------------------------------------------------------

    def admit(self, kv: SequenceKV, row: int, hit: PrefixHit, num_tokens: int) -> bool:
        """Gives `kv` the empty row with its cached blocks and room for `num_tokens` tokens.

        Returns False, with nothing changed, if the pool has too few blocks.
        """
        wanted = -(-num_tokens // self.block_size) - hit.num_blocks
        if wanted * len(self.tables) > self.room(hit):
            return False
        kv.row = row
        for table, blocks in zip(self.tables, hit.blocks, strict=False):
            self.pool.acquire(blocks)
            table.append(row, blocks)
        kv.num_published = hit.num_blocks
        self._extend(kv, num_tokens)
        self._announce(kv)
        return True

    def _visible(self, group: int, cached: Int32) -> Int32:
        """Makes holes of leading blocks that a token behind them no longer sees."""
        first = min(self._first_visible(group, len(cached) * self.block_size), len(cached))
        cached[:first] = NULL_BLOCK
        assert (cached[first:] != NULL_BLOCK).all(), "a hit names a block that nobody knows"
        return cached

    def _first_visible(self, group: int, position: int) -> int:
        """Returns the first column that a token at `position` or later can still see."""
        return self._visibilities[group].first_visible(position) // self.block_size

    def allocate(self, kv: SequenceKV, num_computed: int, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens of which `num_computed` are computed.

        Returns False, with no block taken, if the pool has too few.
        """
        assert kv.row is not None
        for group, table in enumerate(self.tables):
            first = self._first_visible(group, num_computed)
            if first:
                self._release(table.forget(kv.row, 0, first)[::-1])
        wanted = -(-num_tokens // self.block_size) - self.tables[0].lengths[kv.row]
        if wanted * len(self.tables) > self.pool.num_free:
            return False
        self._extend(kv, num_tokens)
        return True

    def _extend(self, kv: SequenceKV, num_tokens: int) -> None:
        assert kv.row is not None
        for table in self.tables:
            wanted = -(-num_tokens // self.block_size) - table.lengths[kv.row]
            if wanted > 0:
                row = table.row(kv.row)
                after = int(row[-1]) if len(row) else NULL_BLOCK
                table.append(kv.row, self._take(wanted, after))
        kv.capacity = self.tables[0].lengths[kv.row] * self.block_size

    def _take(self, count: int, after: int = NULL_BLOCK) -> list[int]:
        blocks, evicted = self.pool.allocate(count, after)
        for key in evicted:
            self.index.remove(key)
        if self._poison:
            self._emptied.extend(blocks)
        return blocks

    def fork(self, parent: SequenceKV, child: SequenceKV, row: int, num_tokens: int) -> bool:
        """Gives `child` the first `num_tokens` computed tokens of `parent` and room for one more.

        Full blocks are shared; the block that the child writes next is copied, one per group.
        Returns False, with nothing changed, if that is impossible: no free block, or the parent
        no longer has a block that the child must see.
        """
        assert parent.row is not None
        full, tail = divmod(num_tokens, self.block_size)
        if self.pool.num_free < len(self.tables):
            return False
        rows = [table.row(parent.row)[: full + (tail > 0)] for table in self.tables]
        for group, blocks in enumerate(rows):
            if NULL_BLOCK in blocks[self._first_visible(group, num_tokens) :]:
                return False
        child.row = row
        for table, blocks in zip(self.tables, rows, strict=True):
            self.pool.acquire(blocks[:full])
            own = self._take(1)
            if tail:
                self._copies.append((int(blocks[full]), own[0]))
            table.append(row, np.append(blocks[:full], own))
        child.capacity = (full + 1) * self.block_size
        child.digests = parent.digests[:full]
        child.num_published = min(parent.num_published, full)
        return True

    def publish(self, kv: SequenceKV, token_ids: array[int], num_computed: int) -> None:
        """Makes the full blocks among the first `num_computed` tokens findable by others."""
        last = min(num_computed, len(token_ids)) // self.block_size
        if kv.row is None or not kv.writes_cache or last <= kv.num_published:
            return
        self._digester.extend(kv.digests, kv.root, token_ids, self.block_size)
        for i in range(kv.num_published, last):
            content = self._content(token_ids, i)
            for table in self.tables:
                block = int(table.row(kv.row)[i])
                if block == NULL_BLOCK or self.pool.key(block) is not None:
                    continue
                key = BlockKey(table.group, kv.digests[i])
                if self.index.insert(key, block, content, kv.root):
                    self.pool.set_key(block, key)
        kv.num_published = last
        self._announce(kv)

    def _announce(self, kv: SequenceKV) -> None:
        """Tells others which block `kv` computes next."""
        self._retract(kv)
        if kv.writes_cache and kv.num_published < min(kv.prompt_blocks, len(kv.digests)):
            digest = kv.digests[kv.num_published]
            kv.computing = digest
            self._computing[digest] = self._computing.get(digest, 0) + 1

    def _retract(self, kv: SequenceKV) -> None:
        if kv.computing is None:
            return
        count = self._computing.pop(kv.computing) - 1
        if count:
            self._computing[kv.computing] = count
        kv.computing = None

    def release(self, kv: SequenceKV) -> None:
        """Gives back all blocks and the row's table; the prefix stays findable until evicted."""
        self._retract(kv)
        if kv.row is None:
            return
        for table in self.tables:
            self._release(table.clear(kv.row)[::-1])
        kv.row = None
        kv.num_published = 0
        kv.capacity = 0

    def _release(self, blocks: Int32) -> None:
        emptied = self.pool.release(blocks)
        if self._poison:
            self._emptied.extend(emptied)

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; returns False, forgetting none, while a sequence holds
        blocks."""
        if self.pool.num_referenced:
            return False
        self.index.clear()
        emptied = self.pool.forget_keys()
        if self._poison:
            self._emptied.extend(emptied)
        return True

    # -- for the next step plan --------------------------------------------------------------

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        copies, self._copies = tuple(self._copies), []
        return copies

    def take_deltas(self) -> tuple[TableDelta, ...]:
        return tuple(delta for table in self.tables for delta in table.take_deltas())

    def take_emptied(self) -> tuple[int, ...]:
        """Returns blocks whose content nobody may read any more (test mode only)."""
        emptied, self._emptied = tuple(self._emptied), []
        return emptied

    def check_writable(self, kv: SequenceKV, num_computed: int) -> None:
        """Raises AssertionError if a block that `kv` has yet to write is shared or published."""
        assert kv.row is not None
        for table in self.tables:
            for block in table.row(kv.row)[num_computed // self.block_size :].tolist():
                assert self.pool.is_writable(block), f"block {block} would be written by two"

    def check(self, rows: Sequence[int]) -> None:
        """Raises AssertionError unless reference counts equal table entries of `rows`, keys and
        index agree, and no other row holds a block."""
        self.pool.check()
        counts = [0] * self.pool.num_blocks
        for table in self.tables:
            for row in range(len(table.lengths)):
                assert row in rows or table.lengths[row] == 0, f"row {row} was not cleared"
            for row in rows:
                for block in table.row(row).tolist():
                    counts[block] += 1
        for block in range(1, self.pool.num_blocks):
            assert counts[block] == self.pool.ref_count(block), f"block {block} leaks"
        published = dict(self.index.items())
        assert len(set(published.values())) == len(published)
        for block in range(1, self.pool.num_blocks):
            key = self.pool.key(block)
            assert key is None or published.get(key) == block, f"block {block} lost its key"
        assert all(self.pool.key(block) == key for key, block in published.items())
