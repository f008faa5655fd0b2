"""How many pages the running sequences will need at most within the next steps.

Made by the scheduler whenever somebody waits. Arithmetic on lengths; it never looks at a page. How
the pages of a KV group grow with a sequence is what the manager says (`Demand`).
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self._added: list[NDArray[np.int32] | Growing] = []
        """Counted in `_most`, but not in the arrays yet: where there is room for the most, nobody
        asks further."""
        self._most = np.zeros(num_classes, np.int64)
        self._held = np.zeros(num_classes, np.int64)
        self._pages_a_block = np.zeros(num_classes, np.int64)
        for demand in demands:
            if not demand.is_constant:
                self._pages_a_block[demand.page_class] += demand.num_groups
        self._num_referenced: Need | None = None
        self._shared = np.zeros((num_classes, 1), np.int64)

    def add(self, sequence: Growing) -> None:
        """Counts a sequence in, beside what `share` speaks of."""
        self._added.append(sequence)
        self._most += self._most_of(sequence)

    def add_all(self, columns: NDArray[np.int32]) -> None:
        """Counts sequences in: [4, sequences] in the order of `Growing`."""
        self._added.append(columns)
        _, left, missing, _ = columns
        steps = np.minimum(left, self._horizon)
        self._most += self._of_blocks(int((missing - -steps // self._block_size).sum()))

    def share(self, num_referenced: Need) -> None:
        """What was added first holds no more than `num_referenced` pages: where it seems to hold
        more, so many fewer come back when holders end, whoever they are."""
        self._num_referenced = num_referenced

    def fits(self, sequence: Growing, room: Room, needed: Need) -> bool:
        """Whether there is room at every step if `sequence` takes `needed` pages and runs too."""
        most = self._most + self._most_of(sequence) + needed
        return room.fits(most) or room.fits(self.wanted_with(sequence) + needed[:, None])

    def _most_of(self, one: Growing) -> Need:
        """Returns what it takes at most, if nothing comes back."""
        steps = min(self._horizon, one.num_left)
        return self._of_blocks(one.num_missing - -steps // self._block_size)

    def _of_blocks(self, blocks: int) -> Need:
        """Returns the pages of so many blocks that come at any time."""
        return self._pages_a_block * blocks

    def wanted_with(self, sequence: Growing) -> Need:
        """Returns [classes, horizon + 1]: the pages wanted at each step if `sequence` runs too."""
        self._count_in()
        taken, given_back, _ = self._of(_columns(sequence))
        returned = np.maximum(self._given_back + given_back - self._shared, 0)
        return np.maximum(self._taken + taken - returned, 0)

    def _count_in(self) -> None:
        for one in self._added:
            columns = _columns(one) if isinstance(one, Growing) else one
            taken, given_back, held = self._of(columns)
            self._taken += taken
            self._given_back += given_back
            self._held += held
            if self._num_referenced is not None:
                self._shared = np.maximum(self._held - self._num_referenced, 0)[:, None]
                self._num_referenced = None
        self._added = []

    def _of(self, columns: NDArray[np.int32]) -> tuple[Need, Need, Need]:
        """Returns what they take and give back at each step, and what they hold now.

        A sequence of `tokens` takes its next block at the step that brings the first token of it,
        and one more every `block_size` steps: only these steps are looked at, not all."""
        tokens, left, missing, held = columns.astype(np.int64)
        size, horizon = self._block_size, self._horizon
        first, end = -tokens % size + 1, left + END_LAG + 1
        nth = np.arange(1, -(-horizon // size) + 1)[:, None]
        steps = first + (nth - 1) * size
        is_taken = (steps <= left) & (steps <= horizon)
        num_taken = np.maximum((left - first) // size + 1, 0)
        is_over = end <= horizon
        taken, given_back = np.zeros_like(self._taken), np.zeros_like(self._given_back)
        held_now = np.zeros_like(self._held)
        for demand in self._demands:
            at, count = demand.page_class, demand.num_groups
            holds = demand.bound(held)
            held_now[at] += holds.sum() * count
            given_back[at] += self._from_steps(end[is_over], holds[is_over]) * count
            if demand.is_constant:
                continue
            more = demand.bound(held + missing + nth) > demand.bound(held + missing + nth - 1)
            grows = self._from_steps(steps[is_taken & more], None)
            grows += (demand.bound(held + missing) - holds).sum()
            all_taken = demand.bound(held + missing + num_taken) - holds
            grows -= self._from_steps(end[is_over], all_taken[is_over])
            taken[at] += grows * count
        return taken, given_back, held_now

    def _from_steps(self, steps: Int64, pages: Int64 | None) -> Int64:
        """Returns [horizon + 1]: the sum of `pages` (None: one each) of all steps up to each."""
        found = np.bincount(steps, pages, minlength=self._horizon + 1)
        return found.cumsum().astype(np.int64)


def _columns(sequence: Growing) -> NDArray[np.int32]:
    return np.array(sequence, np.int32)[:, None]
