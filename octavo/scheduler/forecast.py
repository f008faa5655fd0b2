"""How many blocks the running sequences will need at most within the next steps.

Made by the scheduler whenever somebody waits. Arithmetic on lengths; it never looks at a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

END_LAG = 1
"""Steps that are scheduled between a sequence's last token and the news of it."""


class Growing(NamedTuple):
    """A sequence that decodes, or will. Blocks are those of one table."""

    num_tokens: int
    num_left: int
    """Tokens until it ends at the latest."""
    num_missing: int
    """Blocks that the tokens it has already still lack."""
    num_held: int
    """Blocks that it gives back when it ends."""


class Forecast:
    """Blocks wanted beyond those held now, for each of the next `horizon` steps.

    A sequence takes a token a step until its limit, and then gives back what it held. It may end
    earlier, which only leaves more.
    """

    def __init__(self, horizon: int, block_size: int, num_tables: int) -> None:
        self._steps = np.arange(horizon + 1)
        self._block_size = block_size
        self._num_tables = num_tables
        self._taken = np.zeros(horizon + 1, np.int64)
        self._given_back = np.zeros(horizon + 1, np.int64)
        self._num_shared = 0

    def add(self, sequences: Iterable[Growing]) -> None:
        """Counts sequences in."""
        taken, given_back = self._of(sequences)
        self._taken += taken
        self._given_back += given_back

    def share(self, num_referenced: int, num_held: int) -> None:
        """`num_held` table entries name only `num_referenced` blocks: so many fewer come back when
        their holders end, whoever they are."""
        self._num_shared = num_held * self._num_tables - num_referenced

    def peak_with(self, sequence: Growing) -> int:
        """Returns the most blocks wanted at any one step if `sequence` runs too."""
        taken, given_back = self._of((sequence,))
        returned = np.maximum(self._given_back + given_back - self._num_shared, 0)
        return max(0, int((self._taken + taken - returned).max()))

    def _of(self, sequences: Iterable[Growing]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        columns = np.array(list(sequences), np.int64).reshape(-1, 4, 1).transpose(1, 0, 2)
        tokens, left, missing, held = columns
        size = self._block_size
        grown = tokens + np.minimum(self._steps, left)
        wanted = missing - -grown // size + -tokens // size
        is_over = self._steps > left + END_LAG
        taken = np.where(is_over, 0, wanted).sum(axis=0) * self._num_tables
        return taken, (is_over * held).sum(axis=0) * self._num_tables
