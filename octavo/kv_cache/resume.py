"""Where a sequence can go on behind cached blocks: what a prefix hit of one KV group rests on.

Called by the KV cache manager. Arithmetic on what is known; it never looks at a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.step import Bool
from octavo.visibility import Chunk, Full, KVVisibility, State, Window


def can_resume(visibility: KVVisibility, known: Bool, block_size: int) -> Bool:
    """Returns [N + 1]: whether a sequence can go on behind n leading blocks, which is so where all
    that any later token sees of them is cached. `known` [N] says which are: of a state, that behind
    each block."""
    ends = np.arange(len(known) + 1) * block_size
    match visibility:
        case Full():
            return np.concatenate((np.ones(1, np.bool_), np.logical_and.accumulate(known)))
        case Window(size):
            return _is_known_from(np.maximum(ends - size + 1, 0) // block_size, known)
        case Chunk(size):
            return _is_known_from(ends // size * size // block_size, known)
        case State():
            return np.concatenate((np.ones(1, np.bool_), known))


def _is_known_from(firsts: NDArray[np.int64], known: Bool) -> Bool:
    """Returns [N + 1]: whether blocks firsts[n] to n (excluded) are all known."""
    latest_unknown = np.full(len(known) + 1, -1)
    columns = np.where(known, -1, np.arange(len(known)))
    np.maximum.accumulate(columns, out=latest_unknown[1:])
    return latest_unknown < firsts
