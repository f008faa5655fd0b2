"""How many blocks the running sequences will need at most within the next steps.

Made by the scheduler whenever somebody waits. Arithmetic on lengths; it never looks at a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        self._horizon = horizon
        self._block_size = block_size
        self._num_tables = num_tables
        self._taken = np.zeros(horizon + 1, np.int64)
        self._given_back = np.zeros(horizon + 1, np.int64)
        self._added: list[Growing] = []
        """Counted in `_most`, but not in the arrays yet: where there is room for the most, nobody
        asks further."""
        self._most = 0
        self._num_shared = 0

    def add(self, sequences: Iterable[Growing]) -> None:
        """Counts sequences in."""
        added = list(sequences)
        self._added += added
        self._most += sum(map(self._most_of, added))

    def share(self, num_referenced: int, num_held: int) -> None:
        """`num_held` table entries name only `num_referenced` blocks: so many fewer come back when
        their holders end, whoever they are."""
        self._num_shared = num_held * self._num_tables - num_referenced

    def fits(self, sequence: Growing, room: int) -> bool:
        """Whether `room` blocks are enough at every step if `sequence` runs too."""
        return self._most + self._most_of(sequence) <= room or self.peak_with(sequence) <= room

    def _most_of(self, sequence: Growing) -> int:
        """Returns what it takes at most, if nothing comes back."""
        steps = min(self._horizon, sequence.num_left)
        return (sequence.num_missing - -steps // self._block_size) * self._num_tables

    def peak_with(self, sequence: Growing) -> int:
        """Returns the most blocks wanted at any one step if `sequence` runs too."""
        if self._added:
            taken, given_back = self._of(self._added)
            self._taken += taken
            self._given_back += given_back
            self._added = []
        taken, given_back = self._of((sequence,))
        returned = np.maximum(self._given_back + given_back - self._num_shared, 0)
        return max(0, int((self._taken + taken - returned).max()))

    def _of(self, sequences: Sequence[Growing]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        columns = np.array(sequences, np.int64).reshape(-1, 4, 1).transpose(1, 0, 2)
        tokens, left, missing, held = columns
        size, steps = self._block_size, np.arange(self._horizon + 1)
        grown = tokens + np.minimum(steps, left)
        wanted = missing - -grown // size + -tokens // size
        is_over = steps > left + END_LAG
        taken = np.where(is_over, 0, wanted).sum(axis=0) * self._num_tables
        return taken, (is_over * held).sum(axis=0) * self._num_tables
