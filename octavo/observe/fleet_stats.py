"""What several engines tell about themselves, as one: sums, and means of shares.

Called by the link to a fleet. A pure function of the snapshots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any

from octavo.observe.stats import (
    MAX_LISTED_REQUESTS,
    MAX_TENANTS,
    OTHER_TENANTS,
    EngineStats,
    GroupUsage,
    MissReason,
    TenantUsage,
)


def total_stats(each: Sequence[EngineStats]) -> EngineStats:
    """Returns what engines of one model count together; shares are means, by used blocks."""
    if not each:
        return EngineStats()
    misses: Counter[MissReason] = Counter()
    for stats in each:
        misses.update(stats.prefix_miss_tokens)
    return EngineStats(
        **_numbers(each),
        prefix_miss_tokens=dict(misses),
        expert_counts=tuple(
            _added(layers)
            for layers in zip_longest(*(stats.expert_counts for stats in each), fillvalue=())
        ),
        expert_imbalance=_means([stats.expert_imbalance for stats in each]),
        groups=_groups(each),
        tenants=_tenants(each),
        sequences=tuple(one for stats in each for one in stats.sequences)[:MAX_LISTED_REQUESTS],
        cache_config=each[0].cache_config,
    )


def _numbers(each: Sequence[EngineStats]) -> dict[str, Any]:
    """Returns the sums of all fields that are numbers, or counts by bucket."""
    found: dict[str, Any] = {}
    for name in (one.name for one in fields(EngineStats)):
        values = [getattr(stats, name) for stats in each]
        if name.endswith("_share"):
            weights = [stats.num_used_blocks + 1 for stats in each]
            parts = zip(values, weights, strict=True)
            found[name] = sum(value * weight for value, weight in parts) / sum(weights)
        elif name.endswith("_counts") and name != "expert_counts":
            found[name] = _added(values)
        elif isinstance(values[0], int | float):
            found[name] = sum(values)
    return found


def _added(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Returns the sums by place; engines that have not counted yet have no places."""
    return tuple(sum(column) for column in zip_longest(*rows, fillvalue=0))


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    columns = list(zip(*(row for row in rows if row), strict=False))
    return tuple(round(sum(column) / len(column), 4) for column in columns)


def _groups(each: Sequence[EngineStats]) -> tuple[GroupUsage, ...]:
    """The engines have one model, and so the same groups."""
    return tuple(
        replace(same[0], used_bytes=sum(group.used_bytes for group in same))
        for same in zip(*(stats.groups for stats in each), strict=False)
    )


def _tenants(each: Sequence[EngineStats]) -> tuple[TenantUsage, ...]:
    found: dict[str, TenantUsage] = {}
    for one in (tenant for stats in each for tenant in stats.tenants):
        found[one.tenant] = _together(found.get(one.tenant), one, one.tenant)
    rest = found.pop(OTHER_TENANTS, None)
    ordered = sorted(found.values(), key=lambda one: (-one.kv_bytes, one.tenant))
    for one in ordered[MAX_TENANTS:]:
        rest = _together(rest, one, OTHER_TENANTS)
    return (*ordered[:MAX_TENANTS], *([rest] if rest else []))


def _together(known: TenantUsage | None, one: TenantUsage, name: str) -> TenantUsage:
    if known is None:
        return replace(one, tenant=name)
    return TenantUsage(
        tenant=name,
        num_running=known.num_running + one.num_running,
        num_waiting=known.num_waiting + one.num_waiting,
        kv_bytes=known.kv_bytes + one.kv_bytes,
    )
