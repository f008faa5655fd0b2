"""How many pages the running sequences will need at most within the next steps.

Made by the scheduler whenever somebody waits. Arithmetic on lengths; it never looks at a page. How
the pages of a KV group grow with a sequence is what the manager says (`Demand`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.layout import Need
from octavo.kv_cache.page_pools import Room
from octavo.kv_cache.records import Demand

Int64 = NDArray[np.int64]
END_LAG = 1
"""Steps that are scheduled between a sequence's last token and the news of it."""


class Growing(NamedTuple):
    """A sequence that decodes, or will. Blocks are those of a group that sees all tokens."""

    num_tokens: int
    num_left: int
    """Tokens until it ends at the latest."""
    num_missing: int
    """Blocks that the tokens it has already still lack."""
    num_held: int
    """Blocks that it gives back when it ends."""


class Forecast:
    """Pages wanted beyond those held now, for each of the next `horizon` steps.

    A sequence takes a token a step until its limit, and then gives back what it held. It may end
    earlier, which only leaves more.
    """

    def __init__(
        self, horizon: int, block_size: int, num_classes: int, demands: Sequence[Demand]
    ) -> None:
        self._horizon = horizon
        self._block_size = block_size
        self._demands = demands
        self._taken = np.zeros((num_classes, horizon + 1), np.int64)
        self._given_back = np.zeros((num_classes, horizon + 1), np.int64)
        self._added: list[Growing] = []
        """Counted in `_most`, but not in the arrays yet: where there is room for the most, nobody
        asks further."""
        self._most = np.zeros(num_classes, np.int64)
        self._held = np.zeros(num_classes, np.int64)
        self._shared = np.zeros((num_classes, 1), np.int64)

    def add(self, sequences: Iterable[Growing]) -> None:
        """Counts sequences in."""
        added = list(sequences)
        self._added += added
        self._most += self._most_of(added)

    def share(self, num_referenced: Need) -> None:
        """What was added holds no more than `num_referenced` pages: where it seems to hold more, so
        many fewer come back when holders end, whoever they are."""
        self._count_in()
        self._shared = np.maximum(self._held - num_referenced, 0)[:, None]

    def fits(self, sequence: Growing, room: Room, needed: Need) -> bool:
        """Whether there is room at every step if `sequence` takes `needed` pages and runs too."""
        most = self._most + self._most_of((sequence,)) + needed
        return room.fits(most) or room.fits(self.wanted_with(sequence) + needed[:, None])

    def _most_of(self, sequences: Sequence[Growing]) -> Need:
        """Returns what they take at most, if nothing comes back."""
        blocks = 0
        for one in sequences:
            steps = min(self._horizon, one.num_left)
            blocks += one.num_missing - -steps // self._block_size
        most = np.zeros(len(self._most), np.int64)
        for demand in self._demands:
            if not demand.is_constant:
                most[demand.page_class] += blocks * demand.num_groups
        return most

    def wanted_with(self, sequence: Growing) -> Need:
        """Returns [classes, horizon + 1]: the pages wanted at each step if `sequence` runs too."""
        self._count_in()
        taken, given_back, _ = self._of((sequence,))
        returned = np.maximum(self._given_back + given_back - self._shared, 0)
        return np.maximum(self._taken + taken - returned, 0)

    def _count_in(self) -> None:
        if self._added:
            taken, given_back, held = self._of(self._added)
            self._taken += taken
            self._given_back += given_back
            self._held += held
            self._added = []

    def _of(self, sequences: Sequence[Growing]) -> tuple[Need, Need, Need]:
        """Returns what they take and give back at each step, and what they hold now."""
        columns = np.array(sequences, np.int64).reshape(-1, 4, 1).transpose(1, 0, 2)
        tokens, left, missing, held = columns
        size, steps = self._block_size, np.arange(self._horizon + 1)
        grown = tokens + np.minimum(steps, left)
        wanted = held + missing - -grown // size + -tokens // size
        is_over = steps > left + END_LAG
        taken, given_back = np.zeros_like(self._taken), np.zeros_like(self._given_back)
        held_now = np.zeros_like(self._held)
        for demand in self._demands:
            holds = demand.bound(held)
            takes = 0 if demand.is_constant else demand.bound(wanted) - holds
            at = demand.page_class
            taken[at] += np.where(is_over, 0, takes).sum(axis=0) * demand.num_groups
            given_back[at] += (is_over * holds).sum(axis=0) * demand.num_groups
            held_now[at] += holds.sum() * demand.num_groups
        return taken, given_back, held_now
