"""Owns the physical blocks: reference counts, the free order, which key a block is known by.

Called by the KV cache manager alone. Never knows tokens, sequences or tensors.

Life of a block:

    free, no key --allocate--> referenced --publish--> referenced, keyed
         ^                        |   ^                      |
         |                 release|   |acquire               |release (last reference)
         |                        v   |                      v
         +------------------- (last reference)         free, keyed (order of eviction)
         |                                                   |
         +--------------- allocate, when too few keyless blocks are free: the key is forgotten

Block 0 is the null block: it stands in tables for blocks behind a window and is never handed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from octavo.kv_cache.eviction import EvictionOrder
from octavo.kv_cache.free_pages import REGION, FreePages
from octavo.step import Bool, Int32

NULL_BLOCK = 0
_AWAY = -1
"""Reference count of a block that is withdrawn."""
MAX_ROOM_SHARE, _MAX_SCATTERED_SHARE = 1 / 8, 1 / 16
"""For each block in use, those that may be free while others are evicted for the sake of runs: as
room behind sequences that grow, and between others."""
_REACH = 256
"""Blocks next to go among which those are looked for that make whole regions."""
_REGIONS_AT_ONCE = 8
Blocks = Sequence[int] | Int32
"""Each but the null block at most once."""


class BlockKey(NamedTuple):
    """What a published block holds: its KV group and the chained digest of its tokens."""

    group: int
    digest: bytes


class BlockPool:
    """All blocks but the null block are either referenced or in exactly one free order."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, got {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._ref_counts[NULL_BLOCK] = 1
        self._num_away = 0
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._is_keyed = np.zeros(num_blocks, np.bool_)
        self._free = FreePages(num_blocks)
        self._free.add(np.arange(1, num_blocks, dtype=np.int32))
        self._cached = EvictionOrder(num_blocks)
        self._enough = 0
        """While more are free, nobody is evicted that a few pages may lie well."""

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated now, those that still hold a cached prefix included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks nobody references that still hold a known prefix."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - 1 - self.num_free - self._num_away

    def is_unreferenced(self) -> Bool:
        """Returns [num_blocks]: which blocks are here and nobody references."""
        return self._ref_counts == 0

    def is_here(self) -> Bool:
        """Returns [num_blocks]: which blocks are not withdrawn."""
        return self._ref_counts != _AWAY

    def is_keyed(self) -> Bool:
        """Returns [num_blocks]: which blocks are known by a key; not to be written to."""
        return self._is_keyed

    def ref_count(self, block: int) -> int:
        return int(self._ref_counts[block])

    def num_unreferenced(self, blocks: Int32) -> int:
        """Returns how many of `blocks` nobody references."""
        if not len(blocks):
            return 0
        return len(blocks) - int(np.count_nonzero(self._ref_counts[blocks]))

    def was_evicted(self, digest: bytes) -> bool:
        """Whether the prefix `digest` was evicted lately."""
        return self._cached.was_evicted(digest)

    def num_uses(self, blocks: Int32) -> Int32:
        """Returns how often somebody came for what each of `blocks` holds, as far as its order of
        eviction counts."""
        return self._cached.uses(blocks)

    def key(self, block: int) -> BlockKey | None:
        return self._keys[block]

    def is_writable(self, block: int) -> bool:
        """Whether its one holder may write into it: nobody else sees it, no key promises it."""
        return self.ref_count(block) == 1 and self._keys[block] is None

    def allocate(self, count: int, after: int = NULL_BLOCK) -> tuple[list[int], list[BlockKey]]:
        """Returns `count` blocks with one reference each, and the keys evicted for them.

        Blocks that follow `after` without a gap are preferred, else such that lie in a row, so
        that kernels and copies can take them in one piece. The caller checks `num_free` first.
        """
        assert count <= self.num_free, "allocate more than is free"
        is_growing = after != NULL_BLOCK
        blocks = self._free.take_behind(after, count) if is_growing else []
        evicted: list[BlockKey] = []
        rest = count - len(blocks)
        if rest:
            evicted = self._evict_for(rest)
            blocks += self._free.take(rest, is_growing=is_growing)
        if count == 1:
            self._ref_counts[blocks[0]] = 1
        else:
            self._ref_counts[blocks] = 1
        return blocks, evicted

    def allocate_each(self, after: Int32) -> tuple[Int32, list[BlockKey]]:
        """As `allocate` of one block behind each of `after`, several times faster."""
        blocks = self._free.take_behind_each(after)
        self._ref_counts[blocks] = 1  # of the null block, too, which always is
        evicted: list[BlockKey] = []
        places = np.flatnonzero(blocks == NULL_BLOCK)
        missing = len(places) - len(self._free)
        if missing > 0:
            evicted = self._evict_oldest(missing)
        for place in places.tolist():
            found, keys = self.allocate(1, after.item(place))
            blocks[place] = found[0]
            evicted += keys
        return blocks, evicted

    def _evict_for(self, count: int) -> list[BlockKey]:
        """Evicts so that `count` blocks are free, in whole regions where that costs little.

        The oldest go until there are whole regions; what is free beside `count` is room to grow.
        """
        missing = count - len(self._free)
        evicted = self._evict_oldest(missing) if missing > 0 else []
        if count < REGION and len(self._free) - count > self._enough:
            return evicted  # one who grows would look anew for every page
        max_room = int(MAX_ROOM_SHARE * self.num_referenced)
        max_scattered = int(_MAX_SCATTERED_SHARE * self.num_referenced)
        step = REGION
        while len(self._cached) and self._free.num_whole * REGION < count:
            spare = len(self._free) - count
            num = self._num_for_regions(count, max_room - spare)
            num = num or min(step, max_scattered - spare)
            if num <= 0:
                break
            evicted += self._evict_oldest(num)
            step *= 2
        spare, is_found = len(self._free) - count, self._free.num_whole * REGION >= count
        self._enough = spare if is_found else spare - max(spare // 8, 1)
        return evicted

    def _num_for_regions(self, count: int, room: int) -> int:
        """Returns how many to evict so that there are whole regions for `count` blocks, or some;
        0 if not even one comes of the next that go, `room` of them at most."""
        wanted = max(-(-count // REGION), _REGIONS_AT_ONCE) - self._free.num_whole
        reach = min(room, max(2 * count, _REACH))
        if reach < REGION:
            return 0
        oldest = self._cached.next(reach)
        places = np.flatnonzero(self._free.would_be_whole(oldest))
        # The place of the last block of each region, found from behind.
        _, last = np.unique(oldest[places[::-1]] // REGION, return_index=True)
        ends = np.sort(places[::-1][last])[:wanted]
        return int(ends[-1]) + 1 if len(ends) else 0

    def _evict_oldest(self, count: int) -> list[BlockKey]:
        """Makes `count` blocks free, or all, in order; returns their keys."""
        evicted: list[BlockKey] = []
        while len(evicted) < count and len(self._cached):
            evicted += self._evict(self._cached.next(count - len(evicted)))
        return evicted

    def _evict(self, blocks: Int32) -> list[BlockKey]:
        """Makes cached blocks free; returns their keys."""
        keys = []
        for block in blocks.tolist():
            key = self._keys[block]
            assert key is not None
            keys.append(key)
            self._keys[block] = None
        self._is_keyed[blocks] = False
        self._cached.evict(blocks, [key.digest for key in keys])
        self._free.add(blocks)
        return keys

    def acquire(self, blocks: Blocks, *, is_hit: bool = True) -> None:
        """Adds a reference to blocks that are referenced or free with a key; null blocks pass.

        `is_hit`: somebody came back for what they hold, so that it is worth more from now on.
        """
        if not len(blocks):
            return  # most often: a prompt that hits nothing
        blocks = np.asarray(blocks, np.int32)
        if not blocks.all():
            blocks = blocks[blocks != NULL_BLOCK]
        if is_hit:
            self._cached.asked_for(blocks)
        self._cached.remove(blocks[self._ref_counts[blocks] == 0])
        self._ref_counts[blocks] += 1

    def release(self, blocks: Sequence[int] | Int32) -> list[int]:
        """Takes one reference from each, of one that is named several times as many; returns those
        that are free now and hold no prefix.

        Release a sequence's blocks last first: then its tail is evicted before its head.
        """
        if not len(blocks):
            return []
        blocks = np.asarray(blocks, np.int32)
        counts = self._ref_counts[blocks]
        if (counts == 1).all():  # most often: nobody shares them, so that each is named once
            self._ref_counts[blocks] = 0
            freed = blocks
        else:
            # Of the very types that NumPy has a fast way for: others take thirty times as long.
            np.subtract.at(self._ref_counts, blocks.astype(np.intp), np.int32(1))
            left = self._ref_counts[blocks]
            assert (left >= 0).all(), f"double free of block {blocks[left.argmin()]}"
            freed = _latest(blocks[left == 0])
        is_keyed = self._is_keyed[freed]
        self._cached.append(freed[is_keyed])
        emptied = freed[~is_keyed]
        self._free.add(emptied)
        return emptied.tolist()

    def set_key(self, block: int, key: BlockKey, parent: int = NULL_BLOCK) -> None:
        """Marks a referenced block as holding the prefix `key`, `parent` the one before it."""
        assert self._ref_counts[block] > 0
        assert self._keys[block] is None
        self._keys[block] = key
        self._is_keyed[block] = True
        self._cached.stored(block, key.digest, parent)

    def set_keys(self, blocks: list[int], keys: list[BlockKey], parents: list[int]) -> None:
        """As `set_key` of each in turn."""
        for block, key in zip(blocks, keys, strict=True):
            assert self._keys[block] is None
            self._keys[block] = key
        assert (self._ref_counts[blocks] > 0).all()
        self._is_keyed[blocks] = True
        self._cached.stored_all(blocks, [key.digest for key in keys], parents)

    def forget_keys(self) -> list[int]:
        """Drops every key; returns the blocks that became free of content by it."""
        self._keys = [None] * self.num_blocks
        self._is_keyed[:] = False
        emptied = self._cached.clear()
        self._free.add(emptied)
        return emptied.tolist()

    def withdraw(self, blocks: Int32) -> list[BlockKey]:
        """Takes blocks that nobody references out of the pool, until `restore` brings them back;
        returns the keys that are forgotten with them."""
        assert (self._ref_counts[blocks] == 0).all(), "withdraw a block that somebody holds"
        keys = self._evict(blocks[self._is_keyed[blocks]])
        self._free.remove(blocks)
        self._ref_counts[blocks] = _AWAY
        self._num_away += len(blocks)
        return keys

    def restore(self, blocks: Int32) -> None:
        """Makes withdrawn blocks free; they hold nothing."""
        assert (self._ref_counts[blocks] == _AWAY).all(), "restore a block that is here"
        self._ref_counts[blocks] = 0
        self._num_away -= len(blocks)
        self._free.add(blocks)

    def check(self) -> None:
        """Raises AssertionError if the free orders, counts and keys contradict each other."""
        for block in range(1, self.num_blocks):
            places = (block in self._free) + (block in self._cached)
            assert places == (self._ref_counts[block] == 0), f"block {block} in {places} orders"
        self._free.check()
        assert all(self._keys[block] is None for block in self._free.all().tolist())
        cached = self._cached.all().tolist()
        assert len(cached) == len(set(cached)) == len(self._cached)
        assert all(self._keys[block] is not None for block in cached)
        assert [key is not None for key in self._keys] == self._is_keyed.tolist()
        assert self._keys[NULL_BLOCK] is None
        assert self._ref_counts[NULL_BLOCK] == 1


def _latest(blocks: Int32) -> Int32:
    """Returns each of `blocks` once, in the order in which they are named last."""
    _, places = np.unique(blocks[::-1], return_index=True)
    return blocks[len(blocks) - 1 - np.sort(places)[::-1]]
