"""Families of series on their way to a page: renamed, and as `generate_latest` wants them.

Used by `observe.metrics`. Never counts anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample


class Page:
    """Families as `generate_latest` wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def called(family: Metric, name: str) -> Metric:
    """Returns the same series under another name."""
    renamed = Metric(name, f"See {family.name}", family.type)
    start = len(family.name)
    renamed.samples = [Sample(name + one.name[start:], *one[1:]) for one in family.samples]
    return renamed


def renamed(family: Metric, prefix: str = "") -> Metric:
    """Returns a family with `prefix` before its names, and without the times of its creation, which
    nobody asks for and which are as many as its series."""
    renamed = Metric(prefix + family.name, family.documentation, family.type)
    renamed.samples = [
        Sample(prefix + sample.name, *sample[1:])
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return renamed
