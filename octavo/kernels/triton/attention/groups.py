"""Which sequences of a step have equal leading blocks, and which of them to read once.

Asked by the plans of shared.py and prompts.py, on the host. Never knows what is done with a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

Group = tuple[list[int], int]
"""Sequences, and the leading blocks that they share."""


def shared_groups(block_table: np.ndarray, full: np.ndarray, min_blocks: int) -> list[Group]:
    """Returns groups (sequences, leading blocks that are equal) of which each shares `min_blocks`
    at least, and those that save most reads; `full`: blocks of each sequence that count."""
    long = np.flatnonzero(full >= min_blocks)
    firsts = block_table[long, 0]
    _, family, num_rows = np.unique(firsts, return_inverse=True, return_counts=True)
    # Whoever shares anything shares its first block: most steps are done here.
    rows = {s: block_table[s, : full[s]] for s in long[num_rows[family] > 1].tolist()}
    order = sorted(rows, key=lambda s: rows[s].tobytes())
    return [found for found in _best_groups(rows, order, 0)[1] if found[1] >= min_blocks]


def _best_groups(
    rows: Mapping[int, np.ndarray], order: list[int], depth: int
) -> tuple[int, list[Group]]:
    """Returns (block reads saved, groups) for sequences `order`, sorted and equal up to `depth`."""
    if len(order) < 2:
        return 0, []
    first, last = rows[order[0]], rows[order[-1]]
    length = min(len(first), len(last))
    differs = np.flatnonzero(first[depth:length] != last[depth:length])
    common = depth + int(differs[0]) if len(differs) else length
    saved, groups = (len(order) - 1) * common, [(order, common)]
    inner = [_best_groups(rows, part, common) for part in _children(rows, order, common)]
    inner_saved = sum(part[0] for part in inner)
    if inner_saved > saved:
        return inner_saved, [group for _, found in inner for group in found]
    return saved, groups if common else []


def _children(rows: Mapping[int, np.ndarray], order: list[int], at: int) -> Iterator[list[int]]:
    """Yields runs of sequences with the same block at column `at`; those that end there, never."""
    part: list[int] = []
    for s in order:
        if len(rows[s]) <= at:
            continue
        if part and rows[part[-1]][at] != rows[s][at]:
            yield part
            part = []
        part.append(s)
    if part:
        yield part
