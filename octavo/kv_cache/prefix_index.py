"""Finds the block that holds a known prefix: chained SHA-256 of token ids -> physical block.

Called by the KV cache manager. Never copies KV and never counts references.

Digest of block i: SHA-256(digest of the last block before its piece, all token ids of its piece up
to the block's end). A piece is PIECE_BLOCKS blocks, so that a long prompt is hashed in one go and a
sequence that grows hashes little twice. Extras stand for what else decides a block's KV: the image
behind placeholder ids; they begin the hash anew. The root is SHA-256 over domain-tagged fields:
model identity (with the weights' version), KV format, block size and the tenant's salt, so that
neither a stale nor a foreign hit is possible.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice, repeat
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey
from octavo.kv_cache.hash_memory import HashMemory, hash_of
from octavo.observe.stats import MissReason
from octavo.step import Int32

PIECE_BLOCKS = 32
_LONG_PIECES = 4
"""Pieces from which on a prompt is first compared with the one before it."""
_PIECES_REMEMBERED = 2560
"""More than a context of a million tokens has, so that one is known whole when it comes again."""
_CLEARED_REMEMBERED = 65_536
_CONTENTS_REMEMBERED = 65_536
_HASH_BITS = (1 << 64) - 1
_EXTRA_TAG = b"octavo-prefix-extra-1"
NO_EXTRAS: Mapping[int, bytes] = MappingProxyType({})


def prefix_root(**fields: str) -> bytes:
    """Returns the parent digest of a first block; every field is tagged by name and length."""
    digest = hashlib.sha256(b"octavo-prefix-1")
    for name, value in sorted(fields.items()):
        data = value.encode()
        digest.update(f"|{name}:{len(data)}|".encode())
        digest.update(data)
    return digest.digest()


class _Chain(NamedTuple):
    """Digests of the whole pieces of a prompt, with the very ids that they stand for."""

    root: bytes
    block: int
    token_ids: Int32
    digests: list[bytes]

    @staticmethod
    def of(root: bytes, block: int, token_ids: array[int], digests: list[bytes]) -> _Chain:
        count = len(digests) // PIECE_BLOCKS * PIECE_BLOCKS
        return _Chain(root, block, np.array(token_ids[: count * block], np.int32), digests[:count])

    def num_shared(self, root: bytes, block: int, token_ids: array[int]) -> int:
        """Returns the blocks of the whole pieces that `token_ids` begins with as this does."""
        if root != self.root or block != self.block:
            return 0
        ids = np.frombuffer(token_ids, np.int32)[: len(self.token_ids)]
        is_other = ids != self.token_ids[: len(ids)]
        first = int(is_other.argmax()) if is_other.any() else len(ids)
        piece = PIECE_BLOCKS * block
        return first // piece * PIECE_BLOCKS


class Digester:
    """Digests of token ids, those of the latest pieces remembered.

    Requests on one long prefix ask for the same thousands of digests; a piece is found again by its
    parent and its last block, and taken if its very tokens are the same: nothing rests on a shorter
    hash, and only a block is hashed to find it.
    """

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[bytes, bytes], tuple[bytes, tuple[bytes, ...]]] = (
            OrderedDict()
        )
        self._latest = _Chain(b"", 0, np.zeros(0, np.int32), [])
        """Of the last long prompt: those that come on one prefix are compared with it at once."""

    def extend(
        self,
        digests: list[bytes],
        root: bytes,
        token_ids: array[int],
        block: int,
        extras: Mapping[int, bytes] = NO_EXTRAS,
        most: int | None = None,
    ) -> None:
        """Appends the digests of all full blocks of `token_ids` (int32) not yet in `digests`, or of
        the first `most`.

        `extras`: what blocks hold beside their ids, by block; those without an entry hold
        nothing."""
        last = len(token_ids) // block
        last = last if most is None else min(last, most)
        size = block * token_ids.itemsize
        is_long = len(digests) <= PIECE_BLOCKS and last >= _LONG_PIECES * PIECE_BLOCKS
        is_long &= not extras
        if is_long:
            shared = self._latest.num_shared(root, block, token_ids)
            digests += islice(self._latest.digests, len(digests), shared)
        num_shared = len(digests)
        while len(digests) < last:
            start = len(digests) // PIECE_BLOCKS * PIECE_BLOCKS
            stop = min(start + PIECE_BLOCKS, last)
            parent = digests[start - 1] if start else root
            data = token_ids[start * block : stop * block].tobytes()
            if extras:
                of_piece = {i - start: extras[i] for i in range(start, stop) if i in extras}
                digests += _chain(parent, data, size, of_piece)[len(digests) - start :]
            elif stop - start == PIECE_BLOCKS and len(digests) == start:
                digests += self._of_piece(parent, data, size)
            else:
                digests += _chain_on(parent, data, size, len(digests) - start)
        if is_long and 2 * num_shared < last:
            self._latest = _Chain.of(root, block, token_ids, digests)

    def _of_piece(self, parent: bytes, data: bytes, size: int) -> tuple[bytes, ...]:
        """Returns the digests of a whole piece, remembered or made."""
        key = (parent, data[-size:])
        known, found = self._pieces.get(key, (b"", ()))
        if known != data:
            found = _chain_on(parent, data, size, 0)
            self._pieces[key] = data, found
        self._pieces.move_to_end(key)
        if len(self._pieces) > _PIECES_REMEMBERED:
            self._pieces.popitem(last=False)
        return found


def _chain_on(parent: bytes, data: bytes, size: int, known: int) -> tuple[bytes, ...]:
    """Returns the digests of the blocks of a piece, or of its beginning, but for the first
    `known`."""
    digests = []
    state = hashlib.sha256(parent + data[: known * size])
    for start in range(known * size, len(data), size):
        state.update(data[start : start + size])
        digests.append(state.digest())
    return tuple(digests)


def _chain(parent: bytes, data: bytes, size: int, extras: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """As `_chain_on`, of all blocks, some of which have `extras`, by place in the piece."""
    digests = []
    state = hashlib.sha256(parent)
    for index, start in enumerate(range(0, len(data), size)):
        state.update(data[start : start + size])
        digest = state.digest()
        if index in extras:
            # Tag and lengths are fixed: no ids and no other extra make these bytes.
            state = hashlib.sha256(_EXTRA_TAG + digest + hashlib.sha256(extras[index]).digest())
            digest = state.digest()
        digests.append(digest)
    return tuple(digests)


class PrefixIndex:
    """Digest -> block, for each KV group; remembers enough that a miss has a reason."""

    def __init__(self, num_groups: int) -> None:
        self._blocks: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        self._latest: dict[int, tuple[list[bytes], Int32]] = {}
        """What was asked for last, by group, and the blocks of its beginning that were found, while
        they are there: many requests come on one long prefix."""
        self._cleared = HashMemory(_CLEARED_REMEMBERED)
        self._contents = HashMemory(_CONTENTS_REMEMBERED)
        """By content: which root it was stored under."""
        self._newest_root, self._newest_root_hash = b"", 0

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks)

    def knows(self, group: int, digest: bytes) -> bool:
        return digest in self._blocks[group]

    def find_all(self, group: int, digests: list[bytes], count: int) -> Int32:
        """Returns the block of each of the first `count` digests of a chain, the null block where
        none holds it. The chain may only grow from now on: it is kept, since a copy of thousands
        takes longer than all else."""
        known, blocks = self._latest.get(group, ([], np.zeros(0, np.int32)))
        both = range(min(len(blocks), count))
        # A digest stands for all before it: those of two chains are equal up to some place.
        same = bisect_left(both, True, key=lambda place: known[place] != digests[place])
        rest = list(map(self._blocks[group].get, digests[same:count], repeat(NULL_BLOCK)))
        found = np.concatenate((blocks[:same], np.array(rest, np.int32)))
        holes = np.flatnonzero(found == NULL_BLOCK)
        self._latest[group] = digests, found[: holes[0]] if len(holes) else found
        return found.copy()

    def insert(self, key: BlockKey, block: int, content: int, root: bytes) -> bool:
        """Publishes a block; False if another block already holds this key.

        `content` is a hash of the block's tokens alone: it lets a miss be told from a miss of
        another tenant, and decides nothing else.
        """
        group, digest = key.group, key.digest
        blocks = self._blocks[group]
        if digest in blocks:
            return False
        blocks[digest] = block
        if root != self._newest_root:
            self._newest_root, self._newest_root_hash = root, hash_of(root)
        self._contents.add(content & _HASH_BITS, self._newest_root_hash)
        return True

    def remove(self, key: BlockKey) -> None:
        """Forgets an evicted block."""
        self._latest.clear()
        del self._blocks[key.group][key.digest]

    def clear(self) -> None:
        self._latest.clear()
        for blocks in self._blocks:
            for digest in blocks:
                self._cleared.put(hash_of(digest), 0)
            blocks.clear()

    def miss_reason(
        self, digest: bytes, content: int, root: bytes, *, was_evicted: bool
    ) -> MissReason:
        """Says why `digest`, the first of a prompt that was not found, is missing; `was_evicted`:
        as far as the pools remember."""
        if was_evicted or self._cleared.get(hash_of(digest)) is not None:
            return "evicted"
        if self._contents.get(content & _HASH_BITS) not in (None, hash_of(root)):
            return "other_tenant"
        return "never_seen"

    def items(self) -> list[tuple[BlockKey, int]]:
        """All published blocks, for checks."""
        return [
            (BlockKey(group, digest), block)
            for group, blocks in enumerate(self._blocks)
            for digest, block in blocks.items()
        ]
