"""Owns the physical blocks: reference counts, the free order, which key a block is known by.

Called by the KV cache manager alone. Never knows tokens, sequences or tensors.

Life of a block:

    free, no key --allocate--> referenced --publish--> referenced, keyed
         ^                        |   ^                      |
         |                 release|   |acquire               |release (last reference)
         |                        v   |                      v
         +------------------- (last reference)         free, keyed (LRU order)
         |                                                   |
         +--------------- allocate, when no keyless block is free: the key is forgotten

Block 0 is the null block: it stands in tables for blocks behind a window and is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a published block holds: its KV group and the chained digest of its tokens."""

    group: int
    digest: bytes


class BlockPool:
    """All blocks but the null block are either referenced or in exactly one free order."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, got {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._ref_counts[NULL_BLOCK] = 1
        self._keys: list[BlockKey | None] = [None] * num_blocks
        # OrderedDict and not a linked list of our own: removal from the middle (a hit on a free
        # block) is O(1) in it too, and it runs in C.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._free_keyed: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated now, those that still hold a cached prefix included."""
        return len(self._free) + len(self._free_keyed)

    @property
    def num_cached(self) -> int:
        """Blocks nobody references that still hold a known prefix."""
        return len(self._free_keyed)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """Returns how many of `blocks` nobody references."""
        return list(map(self._ref_counts.__getitem__, blocks)).count(0)

    def key(self, block: int) -> BlockKey | None:
        return self._keys[block]

    def is_writable(self, block: int) -> bool:
        """Whether its one holder may write into it: nobody else sees it, no key promises it."""
        return self._ref_counts[block] == 1 and self._keys[block] is None

    def allocate(self, count: int, after: int = NULL_BLOCK) -> tuple[list[int], list[BlockKey]]:
        """Returns `count` blocks with one reference each, and the keys evicted for them.

        Blocks that follow `after` without a gap are preferred, so that long sequences lie in runs
        that kernels and copies read in one piece. The caller checks `num_free` first.
        """
        assert count <= self.num_free, "allocate more than is free"
        blocks: list[int] = []
        evicted: list[BlockKey] = []
        wanted = after + 1
        for _ in range(count):
            if after != NULL_BLOCK and wanted in self._free:
                block = wanted
                del self._free[block]
            elif self._free:
                block, _ = self._free.popitem(last=False)
            else:
                block, _ = self._free_keyed.popitem(last=False)
                key = self._keys[block]
                assert key is not None
                evicted.append(key)
                self._keys[block] = None
            self._ref_counts[block] = 1
            blocks.append(block)
            after, wanted = block, block + 1
        return blocks, evicted

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are referenced or free with a key; null blocks pass."""
        counts, free = self._ref_counts, self._free_keyed
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if counts[block] == 0:
                del free[block]
            counts[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Takes one reference from each; returns those that are free now and hold no prefix.

        Release a sequence's blocks last first: then its tail is evicted before its head.
        """
        emptied: list[int] = []
        counts, keys = self._ref_counts, self._keys
        for block in blocks:
            count = counts[block] - 1
            assert count >= 0, f"double free of block {block}"
            counts[block] = count
            if count:
                continue
            if keys[block] is None:
                self._free[block] = None
                emptied.append(block)
            else:
                self._free_keyed[block] = None
        return emptied

    def set_key(self, block: int, key: BlockKey) -> None:
        """Marks a referenced block as holding the prefix `key`."""
        assert self._ref_counts[block] > 0
        assert self._keys[block] is None
        self._keys[block] = key

    def forget_keys(self) -> list[int]:
        """Drops every key; returns the blocks that became free of content by it."""
        self._keys = [None] * self.num_blocks
        emptied = list(self._free_keyed)
        self._free.update(self._free_keyed)
        self._free_keyed.clear()
        return emptied

    def check(self) -> None:
        """Raises AssertionError if the free orders, counts and keys contradict each other."""
        for block in range(1, self.num_blocks):
            places = (block in self._free) + (block in self._free_keyed)
            assert places == (self._ref_counts[block] == 0), f"block {block} in {places} orders"
        assert all(self._keys[block] is None for block in self._free)
        assert all(self._keys[block] is not None for block in self._free_keyed)
        assert self._keys[NULL_BLOCK] is None
        assert self._ref_counts[NULL_BLOCK] == 1
