"""How many tokens went to each expert since the start, and how evenly they do lately.

Owned by the engine core, which adds what steps report; read when somebody asks for figures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LATELY_TOKENS = 16_384
"""Routed in a layer, at least, before an older reading is given up for a newer one."""


class ExpertLoad:
    """Counts [MoE layers, experts]; nothing for dense models."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] | None = None
        # "Lately" begins at the older of two readings; they move on when there is enough behind.
        self._older: NDArray[np.int64] | None = None
        self._newer: NDArray[np.int64] | None = None

    def add(self, counts: NDArray[np.int64]) -> None:
        """Adds what was routed since the last report."""
        if self._counts is None:
            self._counts = np.zeros_like(counts)
            self._older, self._newer = np.zeros_like(counts), np.zeros_like(counts)
        self._counts += counts

    @property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """[MoE layers][experts] tokens."""
        return () if self._counts is None else tuple(map(tuple, self._counts.tolist()))

    def imbalance(self) -> tuple[float, ...]:
        """Returns, for each MoE layer, tokens of the busiest expert over the mean, lately."""
        counts, older, newer = self._counts, self._older, self._newer
        if counts is None or older is None or newer is None:
            return ()
        if (counts - newer).sum(axis=1).max(initial=0) >= LATELY_TOKENS:
            self._older, self._newer = older, newer = newer, counts.copy()
        lately = counts - older
        mean = lately.mean(axis=1)
        even = np.ones(len(lately))
        shares = np.divide(lately.max(axis=1), mean, out=even, where=mean > 0)
        return tuple(shares.round(4).tolist())
