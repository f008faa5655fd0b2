"""The numbers of one front process as bytes, and the sum of several.

Used by a server of several processes, which has one set of metrics. Never looks at what a number
means.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample


class _Family(msgspec.Struct, array_like=True):
    name: str
    documentation: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Family]).decode


def pack(families: Iterable[Metric]) -> bytes:
    """Returns families of counters, histograms and gauges as bytes."""
    found = [
        _Family(
            family.name,
            family.documentation,
            family.type,
            [(s.name, s.labels, s.value) for s in family.samples],
        )
        for family in families
    ]
    return zlib.compress(_encode(found), 1)


def total(own: Iterable[Metric], others: Sequence[bytes]) -> list[Metric]:
    """Returns `own` with the numbers of `others` added, series by series; of gauges the largest."""
    merged: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}

    def add(name: str, text: str, kind: str, samples: Iterable[tuple[str, dict, float]]) -> None:
        merged.setdefault(name, Metric(name, text, kind))
        series = values.setdefault(name, {})
        for sample, labels, value in samples:
            key = (sample, tuple(labels.items()))
            if key in series and kind == "gauge":
                series[key] = max(series[key], value)
            else:
                series[key] = series.get(key, 0.0) + value

    for family in own:
        triples = ((s.name, s.labels, s.value) for s in family.samples)
        add(family.name, family.documentation, family.type, triples)
    for data in others:
        for one in _decode(zlib.decompress(data)):
            add(one.name, one.documentation, one.kind, one.samples)
    for name, family in merged.items():
        # A counter first seen elsewhere keeps the order of its first appearance.
        family.samples = [
            Sample(sample, dict(labels), value) for (sample, labels), value in values[name].items()
        ]
    return list(merged.values())
