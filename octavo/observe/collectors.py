"""Series that are kept by ourselves, and told when somebody scrapes.

Made by `observe.metrics`. Labels and names are the maker's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class FastHistogram(Collector):
    """One histogram for what is observed at every token: a search and two additions."""

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], labels: dict[str, str]
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = list(buckets)
        self._labels = labels
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._newest = (0.0, bisect_left(self._bounds, 0.0))
        """A value and its bucket: the streams of one step have the same one."""

    def observe(self, value: float) -> None:
        known, place = self._newest
        if value != known:
            place = bisect_left(self._bounds, value)
            self._newest = (value, place)
        self._counts[place] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        cumulative = accumulate(self._counts)
        family.add_metric(
            list(self._labels.values()), list(zip(bounds, cumulative, strict=True)), self._sum
        )
        yield family

    def describe(self) -> Iterable[Metric]:
        return ()


@dataclass(slots=True)
class BatchCounts:
    """What became of batches in this process."""

    lines: dict[str, int] = field(default_factory=lambda: {"completed": 0, "failed": 0})
    ended: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("completed", "failed", "expired", "cancelled"), 0)
    )
    num_open: int = 0
    """Batches that are not over, of all processes."""


class OutcomeCounts(Collector):
    """Something by what became of it, as somebody else counts it."""

    def __init__(self, name: str, text: str, counts: Callable[[], Mapping[str, int]]) -> None:
        self._name = name
        self._text = text
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=["outcome"])
        for outcome, count in self._counts().items():
            family.add_metric([outcome], count)
        yield family

    def describe(self) -> Iterable[Metric]:
        return ()


class GuardNumbers(Protocol):
    """Whoever asks the guard."""

    num_running: int
    num_waiting: int
    seconds: FastHistogram

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """Checks by stage and outcome."""
        ...


class GuardCounts(Collector):
    """Checks by the guard: what became of them, and how many are under way."""

    def __init__(self, gate: GuardNumbers) -> None:
        self._gate = gate

    def collect(self) -> Iterable[Metric]:
        text = "Checks by the guard, by stage and outcome"
        family = CounterMetricFamily("octavo:guard_checks", text, labels=["stage", "outcome"])
        for labels, count in self._gate.counts.items():
            family.add_metric(labels, count)
        yield family
        gate = self._gate
        for name, count in (("running", gate.num_running), ("waiting", gate.num_waiting)):
            text = f"Checks by the guard that are {name}"
            yield GaugeMetricFamily(f"octavo:guard_checks_{name}", text, value=count)

    def describe(self) -> Iterable[Metric]:
        return ()
