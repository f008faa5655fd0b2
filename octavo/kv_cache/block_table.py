"""Owns one KV group's block table: which physical block holds which tokens of which row.

Written by the KV cache manager; the runner keeps a mirror, which it updates with the deltas taken
here once a step. Column j of a row holds tokens [j * block_size, (j + 1) * block_size).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK, Blocks
from octavo.kv_cache.runs import Runs, runs_of
from octavo.step import Int32, TableDelta


class BlockTable:
    """Rows [max_rows, max_blocks] int32 with a length each; unused entries are the null block."""

    def __init__(self, group: int, max_rows: int, max_blocks: int) -> None:
        self.group = group
        self.lengths = [0] * max_rows
        self._blocks = np.zeros((max_rows, max_blocks), np.int32)
        self._deltas: list[TableDelta] = []

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

    def append(self, row: int, blocks: Blocks) -> None:
        """Adds blocks at the end of a row."""
        if not len(blocks):
            return
        column = self.lengths[row]
        self.lengths[row] = column + len(blocks)
        self._write(row, column, blocks)

    def forget(self, row: int, first: int, last: int) -> Int32:
        """Makes holes of columns first..last (excluded); returns the blocks that were there.

        No delta: nobody reads columns behind the window.
        """
        columns = self._blocks[row, first:last]
        blocks = columns[columns != NULL_BLOCK]
        columns[:] = NULL_BLOCK
        return blocks

    def clear(self, row: int) -> Int32:
        """Empties a row; returns the blocks that it held, first to last."""
        blocks = self.forget(row, 0, self.lengths[row])
        self.lengths[row] = 0
        if self._deltas:
            self._deltas = [delta for delta in self._deltas if delta.row != row]
        return blocks

    def take_deltas(self) -> list[TableDelta]:
        """Returns what changed since the last call."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _write(self, row: int, column: int, blocks: Blocks) -> None:
        ids = np.array(blocks, np.int32)
        self._blocks[row, column : column + len(ids)] = ids
        self._deltas.append(TableDelta(group=self.group, row=row, column=column, block_ids=ids))
