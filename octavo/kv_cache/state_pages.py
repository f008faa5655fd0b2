"""Owns what sequences hold of one KV group whose layers keep a state and nothing of their tokens.

Called by the KV cache manager, for one group each; `token_pages` has the same face.

    live page   one a row, in column 0 of its table; never shared, as every step changes it
    checkpoint  an ordinary page, known by the digest of the last block behind which it was taken:
                copied from the live page after a step, findable once that step is committed,
                evicted as others are. A hit copies it to the live page of a new row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from octavo.kv_cache.block_pool import BlockKey
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.ledger import PageLedger
from octavo.kv_cache.spec import KVGroup
from octavo.step import Int32


class StatePages:
    """Rows with a live page each, and the checkpoints of theirs that are being written."""

    def __init__(
        self, group: KVGroup, table: BlockTable, block_size: int, ledger: PageLedger
    ) -> None:
        self.group = group
        self.table = table
        self._index = table.group
        self._block_size = block_size
        self._ledger = ledger
        self._unpublished: dict[int, list[tuple[int, int]]] = {}
        """By row: (tokens, page) of checkpoints whose step is not committed."""

    # -- what it takes -----------------------------------------------------------------------

    def num_missing(self, row: int | None, num_tokens: int, num_cached: int = 0) -> int:
        return int(row is None or self.table.lengths[row] == 0)

    def num_left_to_take(self, num_tokens: int, step_tokens: int, cached: Int32) -> int:
        """One live page; checkpoints are taken only where there is room to spare."""
        return 1

    # -- prefixes ----------------------------------------------------------------------------

    def may_know(self, first: bytes) -> bool:
        """Always: states behind later blocks may be there without that behind the first."""
        return True

    def find(self, digests: list[bytes], count: int) -> Int32:
        """Returns the checkpoint behind each of the first `count` blocks, the null page where there
        is none."""
        return self._ledger.index.find_all(self._index, digests, count)

    def of_hit(self, found: Int32, count: int) -> Int32:
        """Returns the checkpoint behind `count` cached blocks."""
        return found[count - 1 : count] if count else np.zeros(0, np.int32)

    def publish(
        self,
        row: int,
        first: int,
        last: int,
        digests: Sequence[bytes],
        contents: Callable[[int, int], list[int]],
        root: bytes,
    ) -> None:
        """Makes the checkpoints up to block `last` findable."""
        waiting = self._unpublished.pop(row, [])
        for num_tokens, page in waiting:
            block = num_tokens // self._block_size - 1
            if block < last:
                key = BlockKey(self._index, digests[block])
                self._ledger.publish(key, page, contents(block, block + 1)[0], root)
                self._ledger.release(self._index, (page,))
        later = [one for one in waiting if one[0] // self._block_size > last]
        if later:
            self._unpublished[row] = later

    # -- life of a row -----------------------------------------------------------------------

    def admit(self, row: int, cached: Int32) -> None:
        """An empty row begins with a copy of a checkpoint, if there is one, whose reference is
        given back."""
        self._begin(row, cached.tolist())

    def _begin(self, row: int, source: Sequence[int]) -> None:
        (live,) = self._ledger.take(self._index, 1)
        for page in source:
            self._ledger.copy(self._index, page, live)
            self._ledger.release(self._index, (page,))
        self.table.append(row, [live])

    def forget(self, row: int, num_computed: int, kept_from: int | None = None) -> bool:
        """Does nothing: a state is as large as ever."""
        return False

    def extend(self, row: int, count: int) -> None:
        """Does nothing: a state is as large as ever."""

    def grow(self, rows: Int32) -> None:
        """Does nothing: a state is as large as ever."""

    def can_fork(self, parent: int, num_tokens: int, num_computed: int) -> bool:
        """Whether the state of `parent` is that behind `num_tokens` tokens."""
        return num_computed == num_tokens

    def fork(self, parent: int, row: int, num_tokens: int) -> None:
        source = self.table.row(parent).tolist()
        self._ledger.acquire(self._index, source, is_hit=False)
        self._begin(row, source)

    def save(self, row: int, end: int) -> None:
        """Keeps the state that the next step leaves behind `end` tokens; one page has been
        reserved."""
        (page,) = self._ledger.take(self._index, 1)
        self._ledger.save(self._index, int(self.table.row(row)[0]), page)
        self._unpublished.setdefault(row, []).append((end, page))

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            for _, page in self._unpublished.pop(row, []):
                self._ledger.release(self._index, (page,))
        self._ledger.release(self._index, self.table.clear(rows))

    # -- checks ------------------------------------------------------------------------------

    def held(self, row: int) -> list[int]:
        pages = [page for _, page in self._unpublished.get(row, ())]
        return self.table.row(row).tolist() + pages

    def written(self, row: int, num_computed: int) -> list[int]:
        return self.table.row(row).tolist()
