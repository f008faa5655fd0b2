"""How many prompt tokens a step may compute beside its decodes, so that these keep their pace.

Asked by the scheduler before each step, told by the engine core when steps are launched and
collected. It knows times and counts only, and decides nothing but a number of tokens: results never
depend on it.

    seconds of a step = decodes alone (by their number) + prompt tokens (by theirs)

Both are curves through medians of what was seen last, so that a captured graph, a kernel that is
built or a process that had to wait count for nothing. What decodes cost is seen in steps without
prompt tokens: where prompts never cease, every PROBE_STEPS-th step is made one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray

from octavo.step import MAX_PADDED_TOKENS, StepPlan

STRETCH = 2.2
"""A step takes at most so many times what its decodes alone would take."""
MIN_TARGET_SECONDS = 0.015
"""Nobody reads 60 tokens a second: a shorter step would only compute prompts slowly."""
GROWTH, MAX_GROWN_SECONDS = 1.25, 0.05
"""Where prompts never cease, steps are alike, and may all be longer: each up to GROWTH times what
one took lately, as far as MAX_GROWN_SECONDS. Longer ones compute prompts at less cost."""
LATELY_STEPS = 128
MIN_PREFILL_TOKENS = 16
"""A step computes at least so many, whatever its time: prompts always advance."""
FIRST_PREFILL_TOKENS = 512
"""Until costs are known."""
PROBE_STEPS, FIRST_PROBE_STEPS = 64, 8
"""Steps with prompts before one without: where about so many decodes were seen alone, and where
not."""
_MIN_SAMPLE_TOKENS = 16
"""Steps with fewer prompt tokens say nothing of what one costs."""
_KEPT, _TRUSTED = 5, 3
"""Steps of about one size that are remembered, and that make a median."""
_FRESH = 1000
"""Steps after which a size that was not seen again is forgotten: contexts have grown since."""


class Pace:
    """Learns what steps cost. One thread calls it."""

    def __init__(
        self, stretch: float = STRETCH, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._stretch = stretch
        self._decodes = _Curve()
        self._prefills = _Curve()
        """What prompt tokens add."""
        self._lately: deque[float] = deque(maxlen=LATELY_STEPS)
        """Seconds of the last steps with decodes."""
        self._launch_times: dict[int, float] = {}
        self._collect_time = 0.0
        self._num_mixed = 0
        """Steps planned since the last one of decodes alone."""

    # -- what a step may hold ----------------------------------------------------------------

    def prefill_budget(self, num_decodes: int, num_prompts: int) -> int | None:
        """Returns the prompt tokens that may join so many decodes; None for as many as there are.

        `num_prompts` are in line, at least one. A step follows.
        """
        if not num_decodes and num_prompts <= 1:
            return None
        self._num_mixed += 1
        if num_decodes and self._must_probe(num_decodes):
            self._num_mixed = 0
            return 0
        if not self._decodes or not self._prefills:
            return FIRST_PREFILL_TOKENS
        alone = self._decodes.seconds(num_decodes)
        tokens = self._prefills.count(self._target(alone) - alone)
        if num_decodes <= MAX_PADDED_TOKENS // 2:
            tokens = min(tokens, MAX_PADDED_TOKENS - num_decodes)
        return max(tokens, MIN_PREFILL_TOKENS)

    def _target(self, decode_seconds: float) -> float:
        """Returns the seconds that a step may take."""
        target = max(self._stretch * decode_seconds, MIN_TARGET_SECONDS)
        if len(self._lately) < LATELY_STEPS:
            return target
        return max(target, min(GROWTH * median(self._lately), MAX_GROWN_SECONDS))

    def _must_probe(self, num_decodes: int) -> bool:
        """Whether the next step must be of decodes alone, so that it is known what they cost."""
        is_known = self._decodes.knows(num_decodes)
        return self._num_mixed > (PROBE_STEPS if is_known else FIRST_PROBE_STEPS)

    # -- what steps took ---------------------------------------------------------------------

    def launched(self, plan: StepPlan) -> None:
        """A step was handed to the device."""
        self._launch_times[plan.step_id] = self._clock()

    def collected(self, plan: StepPlan) -> None:
        """A step's tokens are there: it ran since the one before it ended, or since its launch."""
        now = self._clock()
        seconds = now - max(self._launch_times.pop(plan.step_id), self._collect_time)
        self._collect_time = now
        num_decodes = int(np.count_nonzero(plan.query_lens == 1))
        self._learn(num_decodes, plan.num_tokens - num_decodes, seconds)

    def lost(self, plan: StepPlan) -> None:
        """A step raised: its time says nothing."""
        del self._launch_times[plan.step_id]
        self._collect_time = self._clock()

    def _learn(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        if num_decodes:
            self._lately.append(seconds)
        if not num_prefill_tokens:
            self._decodes.add(num_decodes, seconds)
            self._num_mixed = 0
        elif num_prefill_tokens >= _MIN_SAMPLE_TOKENS:
            rest = seconds - self._decodes.seconds(num_decodes)
            self._prefills.add(num_prefill_tokens, max(rest, 0.0))


class _Curve:
    """Seconds by a count, as seen lately. More never take less: what says so was an accident."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float, int]]] = {}
        """By `_size` of the count, the one that was seen last at the end."""
        self._num_added = 0
        self._points: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        """Counts, ascending, and their seconds; None when something was added."""

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, count: int, seconds: float) -> None:
        self._num_added += 1
        size = _size(count)
        seen = self._seen.pop(size, None) or deque(maxlen=_KEPT)
        seen.append((count, seconds, self._num_added))
        self._seen[size] = seen
        oldest = next(iter(self._seen))
        if self._seen[oldest][-1][-1] < self._num_added - _FRESH:
            del self._seen[oldest]
        self._points = None

    def knows(self, count: int) -> bool:
        """Whether about so many were seen often enough."""
        return len(self._seen.get(_size(count), ())) >= _TRUSTED

    def seconds(self, count: int) -> float:
        """Returns what so many take, between those that were seen; 0 if none was."""
        return float(np.interp(count, *self._curve())) if self._seen else 0.0

    def count(self, seconds: float) -> int:
        """Returns how many take so long, at least one having been seen."""
        counts, times = self._curve()
        if seconds >= times[-1] > 0:
            return int(counts[-1] * seconds / times[-1])
        return int(np.interp(seconds, np.append(0.0, times), np.append(0.0, counts)))

    def _curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self._points is None:
            often = [seen for seen in self._seen.values() if len(seen) >= _TRUSTED]
            points = np.array(
                sorted(
                    (median(one[0] for one in seen), median(one[1] for one in seen))
                    for seen in often or self._seen.values()
                )
            )
            times = np.minimum.accumulate(points[::-1, 1])[::-1]
            self._points = points[:, 0], times
        return self._points


def _size(count: int) -> int:
    """Returns the same for numbers that differ by less than a quarter: 16..19, 20..23, ..."""
    shift = max(0, count.bit_length() - 3)
    return (count >> shift) << shift
