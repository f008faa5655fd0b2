"""Finds the runs in a row of a block table: blocks in a row there and in memory. No torch.

What reads, copies or moves blocks takes a run at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from octavo.kv_cache.block_pool import NULL_BLOCK
from octavo.step import Int32

LONG_TOKENS = 2000
RUN_TOKENS = 128
"""`share_in_runs` asks which part of the long sequences lies in runs of so many tokens."""


class Runs(NamedTuple):
    """Parallel arrays, in order of columns."""

    columns: Int32
    """Of each run's first block in the row."""
    blocks: Int32
    """Each run's first block."""
    lengths: Int32
    """In blocks."""


def runs_of(row: Int32) -> Runs:
    """Returns the runs of a row's blocks, holes behind a window left out."""
    columns = np.concatenate(([0], np.flatnonzero(row[1:] != row[:-1] + 1) + 1)).astype(np.int32)
    columns = columns[: len(row)]
    lengths = np.diff(columns, append=np.int32(len(row)))
    blocks = row[columns]
    # A hole is a run of its own, unless block 1 comes behind it.
    holes = (blocks == NULL_BLOCK).astype(np.int32)
    is_run = lengths > holes
    return Runs((columns + holes)[is_run], (blocks + holes)[is_run], (lengths - holes)[is_run])


def share_in_runs(rows: Iterable[Int32], block_size: int) -> float:
    """Returns which share (0..1) of the blocks of rows of over LONG_TOKENS tokens lies in runs of
    RUN_TOKENS tokens or more; 1 where no row is that long."""
    least = -(-RUN_TOKENS // block_size)
    total = in_runs = 0
    for row in rows:
        if len(row) * block_size > LONG_TOKENS:
            lengths = runs_of(row).lengths
            total += int(lengths.sum())
            in_runs += int(lengths[lengths >= least].sum())
    return in_runs / total if total else 1.0
