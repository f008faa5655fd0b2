"""Owns one KV group's block table: which physical block holds which tokens of which row.

Written by the KV cache manager; the runner keeps a mirror, which it updates with the deltas taken
here once a step. Column j of a row holds tokens [j * block_size, (j + 1) * block_size).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.block_pool import NULL_BLOCK
from octavo.kv_cache.runs import Runs, runs_of
from octavo.step import Int32, TableDelta

_FEW = 8
"""Blocks that are noted one by one: an array for them would take longer."""


class BlockTable:
    """Rows [max_rows, max_blocks] int32 with a length each; unused entries are the null block."""

    def __init__(self, group: int, max_rows: int, max_blocks: int) -> None:
        self.group = group
        self.lengths = [0] * max_rows
        self._blocks = np.zeros((max_rows, max_blocks), np.int32)
        self._changed_rows: list[int] = []
        self._changed_columns: list[int] = []
        self._changed_blocks: list[int] = []
        """Parallel: what was written since somebody looked, few blocks at a time."""
        self._changed_spans: list[tuple[int, int, Int32]] = []
        """Row, first column and blocks of what was written many at a time."""

    def row(self, row: int) -> Int32:
        """Returns a view of the blocks of `row`, holes behind a window included."""
        return self._blocks[row, : self.lengths[row]]

    def runs(self, row: int) -> Runs:
        """Returns the pieces of memory that `row` consists of."""
        return runs_of(self.row(row))

    def num_distinct(self, rows: Sequence[int], num_blocks: int) -> int:
        """Returns how many of `num_blocks` physical blocks `rows` name, each once."""
        longest = max(self.lengths[row] for row in rows)
        is_named = np.zeros(num_blocks, np.bool_)
        is_named[self._blocks[list(rows), :longest]] = True
        is_named[NULL_BLOCK] = False
        return int(np.count_nonzero(is_named))

    def append(self, row: int, blocks: Sequence[int] | Int32) -> None:
        """Adds blocks at the end of a row."""
        column, count = self.lengths[row], len(blocks)
        self.lengths[row] = column + count
        if count > _FEW:
            written = np.array(blocks, np.int32)
            self._blocks[row, column : column + count] = written
            self._changed_spans.append((row, column, written))
            return
        for place, block in enumerate(map(int, blocks), start=column):
            self._blocks[row, place] = block
            self._changed_blocks.append(block)
        self._changed_rows.extend(repeat(row, count))
        self._changed_columns.extend(range(column, column + count))

    def append_each(self, rows: Int32, blocks: Int32) -> None:
        """Adds a block at the end of each of several rows."""
        each = rows.tolist()
        columns = [self.lengths[row] for row in each]
        self._blocks[rows, columns] = blocks
        for row in each:
            self.lengths[row] += 1
        self._changed_rows += each
        self._changed_columns += columns
        self._changed_blocks += blocks.tolist()

    def lasts(self, rows: Int32) -> Int32:
        """Returns the last block of each of `rows`, none of which is empty."""
        return self._blocks[rows, [self.lengths[row] - 1 for row in rows.tolist()]]

    def last(self, row: int) -> int:
        """Returns the last block of `row`, the null block if it has none."""
        length = self.lengths[row]
        return self._blocks.item(row, length - 1) if length else NULL_BLOCK

    def forget(self, row: int, first: int, last: int) -> Int32:
        """Makes holes of columns first..last (excluded); returns the blocks that were there.

        No delta: nobody reads columns behind the window.
        """
        columns = self._blocks[row, first:last]
        blocks = columns[columns != NULL_BLOCK]
        columns[:] = NULL_BLOCK
        return blocks

    def clear(self, rows: Sequence[int]) -> Int32:
        """Empties rows; returns the blocks that they held, row after row, last to first."""
        held: list[Int32] = []
        for row in rows:
            length, self.lengths[row] = self.lengths[row], 0
            held.append(self._blocks[row, :length][::-1])
        blocks = np.concatenate(held)
        for there in held:
            there[:] = NULL_BLOCK
        self._drop_changes(frozenset(rows))
        return blocks[blocks != NULL_BLOCK]

    def _drop_changes(self, rows: frozenset[int]) -> None:
        self._changed_spans = [span for span in self._changed_spans if span[0] not in rows]
        if rows.isdisjoint(self._changed_rows):
            return
        kept = [place for place, one in enumerate(self._changed_rows) if one not in rows]
        self._changed_rows = [self._changed_rows[place] for place in kept]
        self._changed_columns = [self._changed_columns[place] for place in kept]
        self._changed_blocks = [self._changed_blocks[place] for place in kept]

    def take_delta(self) -> TableDelta | None:
        """Returns what changed since the last call, None if nothing did."""
        if not self._changed_rows and not self._changed_spans:
            return None
        spans = self._changed_spans
        rows = [np.full(len(blocks), row) for row, _, blocks in spans]
        columns = [np.arange(first, first + len(blocks)) for _, first, blocks in spans]
        delta = TableDelta(
            group=self.group,
            rows=_joined(self._changed_rows, rows),
            columns=_joined(self._changed_columns, columns),
            block_ids=_joined(self._changed_blocks, [blocks for _, _, blocks in spans]),
        )
        self._changed_rows, self._changed_columns, self._changed_blocks = [], [], []
        self._changed_spans = []
        return delta


def _joined(few: list[int], many: list[NDArray]) -> Int32:
    found = np.array(few, np.int32)
    return np.concatenate((*many, found), dtype=np.int32) if many else found
