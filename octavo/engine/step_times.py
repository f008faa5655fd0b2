"""How long steps take: each since the one before it ended, or since its own launch.

Told by the engine core when steps are launched and collected. Never decides anything (`pace` does).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from octavo.observe.stats import STEP_SECONDS_BUCKETS


class StepTimes:
    """Steps by seconds since the start. Launched steps are collected in order."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self.counts = [0] * (len(STEP_SECONDS_BUCKETS) + 1)
        """Of STEP_SECONDS_BUCKETS, then of what takes longer."""
        self.seconds = 0.0
        self._clock = clock
        self._launched: deque[float] = deque()
        self._last_end = 0.0

    def launched(self) -> None:
        """A step was handed to the runner."""
        self._launched.append(self._clock())

    def collected(self) -> None:
        """The oldest launched step is over, whatever came of it."""
        now = self._clock()
        seconds = now - max(self._launched.popleft(), self._last_end)
        self._last_end = now
        self.seconds += seconds
        self.counts[bisect_left(STEP_SECONDS_BUCKETS, seconds)] += 1
