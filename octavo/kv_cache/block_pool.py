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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.step import Bool, Int32

NULL_BLOCK = 0
Blocks = Sequence[int] | Int32
"""Each but the null block at most once."""


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a published block holds: its KV group and the chained digest of its tokens."""

    group: int
    digest: bytes


class _OldestFirst:
    """Blocks in the order in which they came in; any of them may be taken out.

    Long sequences bring and take thousands at a time, so none is handled alone: a block knows the
    place of its latest entry, and entries at other places no longer count.
    """

    def __init__(self, num_blocks: int) -> None:
        self._entries = np.zeros(2 * num_blocks, np.int32)
        self._first = self._end = 0
        self._places = np.full(num_blocks, -1)
        """Of each block's entry; -1 for blocks that are not in here."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return bool(self._places[block] >= 0)

    def append(self, blocks: Int32) -> None:
        if self._end + len(blocks) > len(self._entries):
            counting = self.all()
            self._first = self._end = 0
            self._write(counting)
        self._write(blocks)
        self._count += len(blocks)

    def _write(self, blocks: Int32) -> None:
        first, self._end = self._end, self._end + len(blocks)
        self._entries[first : self._end] = blocks
        self._places[blocks] = np.arange(first, self._end)

    def remove(self, blocks: Int32) -> None:
        self._places[blocks] = -1
        self._count -= len(blocks)

    def pop(self) -> int:
        """Takes out the oldest, which there must be."""
        block = self._entries.item(self._first)
        if self._places.item(block) != self._first:
            self._skip()
            block = self._entries.item(self._first)
        self._first += 1
        self._places[block] = -1
        self._count -= 1
        return block

    def _skip(self) -> None:
        """Goes on to the next entry that counts."""
        width = 64
        while not self._counts(self._first, self._first + width).any():
            self._first += width
            width *= 2
        self._first += int(self._counts(self._first, self._first + width).argmax())

    def all(self) -> Int32:
        return self._entries[self._first : self._end][self._counts(self._first, self._end)]

    def _counts(self, first: int, stop: int) -> Bool:
        """Returns which of the entries from `first` to `stop` count."""
        blocks = self._entries[first : min(stop, self._end)]
        return self._places[blocks] == np.arange(first, first + len(blocks))


class BlockPool:
    """All blocks but the null block are either referenced or in exactly one free order."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, got {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = np.zeros(num_blocks, np.int32)
        self._ref_counts[NULL_BLOCK] = 1
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._is_keyed = np.zeros(num_blocks, np.bool_)
        # OrderedDict and not a linked list of our own: removal from the middle (the block behind
        # another one) is O(1) in it too, and it runs in C.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._free_keyed = _OldestFirst(num_blocks)

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
        return int(self._ref_counts[block])

    def num_unreferenced(self, blocks: Int32) -> int:
        """Returns how many of `blocks` nobody references."""
        return len(blocks) - int(np.count_nonzero(self._ref_counts[blocks]))

    def key(self, block: int) -> BlockKey | None:
        return self._keys[block]

    def is_writable(self, block: int) -> bool:
        """Whether its one holder may write into it: nobody else sees it, no key promises it."""
        return self.ref_count(block) == 1 and self._keys[block] is None

    def allocate(self, count: int, after: int = NULL_BLOCK) -> tuple[list[int], list[BlockKey]]:
        """Returns `count` blocks with one reference each, and the keys evicted for them.

        Blocks that follow `after` without a gap are preferred, so that long sequences lie in runs
        that kernels and copies read in one piece. The caller checks `num_free` first.
        """
        assert count <= self.num_free, "allocate more than is free"
        blocks: list[int] = []
        wanted = after + 1
        for _ in range(min(count, len(self._free))):
            if after != NULL_BLOCK and wanted in self._free:
                block = wanted
                del self._free[block]
            else:
                block, _ = self._free.popitem(last=False)
            blocks.append(block)
            after, wanted = block, block + 1
        evicted: list[BlockKey] = []
        for _ in range(count - len(blocks)):
            block = self._free_keyed.pop()
            key = self._keys[block]
            assert key is not None
            evicted.append(key)
            self._keys[block] = None
            self._is_keyed[block] = False
            blocks.append(block)
        self._ref_counts[blocks] = 1
        return blocks, evicted

    def acquire(self, blocks: Blocks) -> None:
        """Adds a reference to blocks that are referenced or free with a key; null blocks pass."""
        blocks = np.asarray(blocks, np.int32)
        blocks = blocks[blocks != NULL_BLOCK]
        self._free_keyed.remove(blocks[self._ref_counts[blocks] == 0])
        self._ref_counts[blocks] += 1

    def release(self, blocks: Blocks) -> list[int]:
        """Takes one reference from each; returns those that are free now and hold no prefix.

        Release a sequence's blocks last first: then its tail is evicted before its head.
        """
        blocks = np.asarray(blocks, np.int32)
        counts = self._ref_counts[blocks] - 1
        assert (counts >= 0).all(), f"double free of block {blocks[counts.argmin()]}"
        self._ref_counts[blocks] = counts
        freed = blocks[counts == 0]
        is_keyed = self._is_keyed[freed]
        self._free_keyed.append(freed[is_keyed])
        emptied = freed[~is_keyed].tolist()
        self._free.update(dict.fromkeys(emptied))
        return emptied

    def set_key(self, block: int, key: BlockKey) -> None:
        """Marks a referenced block as holding the prefix `key`."""
        assert self._ref_counts[block] > 0
        assert self._keys[block] is None
        self._keys[block] = key
        self._is_keyed[block] = True

    def forget_keys(self) -> list[int]:
        """Drops every key; returns the blocks that became free of content by it."""
        self._keys = [None] * self.num_blocks
        self._is_keyed[:] = False
        cached = self._free_keyed.all()
        self._free_keyed.remove(cached)
        emptied = cached.tolist()
        self._free.update(dict.fromkeys(emptied))
        return emptied

    def check(self) -> None:
        """Raises AssertionError if the free orders, counts and keys contradict each other."""
        for block in range(1, self.num_blocks):
            places = (block in self._free) + (block in self._free_keyed)
            assert places == (self._ref_counts[block] == 0), f"block {block} in {places} orders"
        assert all(self._keys[block] is None for block in self._free)
        cached = self._free_keyed.all().tolist()
        assert len(cached) == len(set(cached)) == len(self._free_keyed)
        assert all(self._keys[block] is not None for block in cached)
        assert [key is not None for key in self._keys] == self._is_keyed.tolist()
        assert self._keys[NULL_BLOCK] is None
        assert self._ref_counts[NULL_BLOCK] == 1
