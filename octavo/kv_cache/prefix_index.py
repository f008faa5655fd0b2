"""Finds the block that holds a known prefix: chained SHA-256 of token ids -> physical block.

Called by the KV cache manager. Never copies KV and never counts references.

Digest of block i: SHA-256(digest of block i - 1, its token ids, its extras). Extras stand for what
else decides the block's KV: the image behind placeholder ids. The root is SHA-256 over
domain-tagged fields: model identity (with the weights' version), KV format, block size and the
tenant's salt, so that neither a stale nor a foreign hit is possible.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from itertools import repeat
from types import MappingProxyType

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey
from octavo.observe.stats import MissReason
from octavo.step import Int32

_PIECE_BLOCKS, _PIECES_REMEMBERED = 64, 512
_EVICTED_REMEMBERED = 65_536
_CONTENTS_REMEMBERED = 65_536
NO_EXTRAS: Mapping[int, bytes] = MappingProxyType({})


def prefix_root(**fields: str) -> bytes:
    """Returns the parent digest of a first block; every field is tagged by name and length."""
    digest = hashlib.sha256(b"octavo-prefix-1")
    for name, value in sorted(fields.items()):
        data = value.encode()
        digest.update(f"|{name}:{len(data)}|".encode())
        digest.update(data)
    return digest.digest()


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

    def extend(
        self,
        digests: list[bytes],
        root: bytes,
        token_ids: array[int],
        block: int,
        extras: Mapping[int, bytes] = NO_EXTRAS,
    ) -> None:
        """Appends the digests of all full blocks of `token_ids` (int32) not yet in `digests`.

        `extras`: what blocks hold beside their ids, by block; those without an entry hold
        nothing."""
        first, last = len(digests), len(token_ids) // block
        if first == last:
            return
        data = token_ids[first * block : last * block].tobytes()
        size = block * token_ids.itemsize
        parent = digests[-1] if digests else root
        if extras:
            digests += _chain(parent, data, size, extras, first)
            return
        for start in range(0, len(data), size * _PIECE_BLOCKS):
            piece = data[start : start + size * _PIECE_BLOCKS]
            key = (parent, piece[-size:])
            known, found = self._pieces.get(key, (b"", ()))
            if known != piece:
                found = _chain(parent, piece, size)
                if len(found) == _PIECE_BLOCKS:
                    _remember(self._pieces, key, (piece, found), _PIECES_REMEMBERED)
            digests += found
            parent = found[-1]


def _chain(
    parent: bytes,
    data: bytes,
    size: int,
    extras: Mapping[int, bytes] = NO_EXTRAS,
    first: int = 0,
) -> tuple[bytes, ...]:
    """Digests of blocks `first`...; parent and ids have one length, so that what comes behind them
    is an extra and nothing else."""
    digests = []
    sha256, add = hashlib.sha256, digests.append
    if not extras:
        for start in range(0, len(data), size):
            parent = sha256(parent + data[start : start + size]).digest()
            add(parent)
        return tuple(digests)
    for index, start in enumerate(range(0, len(data), size), first):
        extra = extras.get(index, b"")
        parent = sha256(parent + data[start : start + size] + extra).digest()
        add(parent)
    return tuple(digests)


class PrefixIndex:
    """Digest -> block, for each KV group; remembers recent losses so that a miss has a reason."""

    def __init__(self, num_groups: int) -> None:
        self._blocks: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        self._latest: dict[int, tuple[list[bytes], Int32]] = {}
        """What was asked for last and found, by group, while it is true: many requests on one long
        prefix often come at once."""
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._contents: OrderedDict[int, bytes] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks)

    def find_all(self, group: int, digests: list[bytes]) -> Int32:
        """Returns the block of each digest in a chain, the null block where none holds it."""
        known, blocks = self._latest.get(group, ([], np.zeros(0, np.int32)))
        both = range(min(len(known), len(digests)))
        # A digest stands for all before it: those of two chains are equal up to some place.
        same = bisect_left(both, True, key=lambda place: known[place] != digests[place])
        rest = list(map(self._blocks[group].get, digests[same:], repeat(NULL_BLOCK)))
        found = np.concatenate((blocks[:same], np.array(rest, np.int32)))
        self._latest[group] = digests, found
        return found.copy()

    def insert(self, key: BlockKey, block: int, content: int, root: bytes) -> bool:
        """Publishes a block; False if another block already holds this key.

        `content` is a hash of the block's tokens alone: it lets a miss be told from a miss of
        another tenant, and decides nothing else.
        """
        if key.digest in self._blocks[key.group]:
            return False
        self._latest.clear()
        self._blocks[key.group][key.digest] = block
        self._evicted.pop(key.digest, None)
        _remember(self._contents, content, root, _CONTENTS_REMEMBERED)
        return True

    def remove(self, key: BlockKey) -> None:
        """Forgets an evicted block."""
        self._latest.clear()
        del self._blocks[key.group][key.digest]
        _remember(self._evicted, key.digest, None, _EVICTED_REMEMBERED)

    def clear(self) -> None:
        self._latest.clear()
        for blocks in self._blocks:
            for digest in blocks:
                _remember(self._evicted, digest, None, _EVICTED_REMEMBERED)
            blocks.clear()

    def miss_reason(self, digest: bytes, content: int, root: bytes) -> MissReason:
        """Says why `digest`, the first of a prompt that was not found, is missing."""
        if digest in self._evicted:
            return "evicted"
        if self._contents.get(content, root) != root:
            return "other_tenant"
        return "never_seen"

    def items(self) -> list[tuple[BlockKey, int]]:
        """All published blocks, for checks."""
        return [
            (BlockKey(group, digest), block)
            for group, blocks in enumerate(self._blocks)
            for digest, block in blocks.items()
        ]


def _remember(memory: OrderedDict, key: object, value: object, limit: int) -> None:  # type: ignore[type-arg]
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)
