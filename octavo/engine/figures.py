"""A snapshot of an engine: what `EngineStats` tells, gathered from those who know it.

Called by the engine core when somebody asks. Never changes anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as PySequence
from dataclasses import asdict

from octavo.engine.expert_load import ExpertLoad
from octavo.engine.step_times import StepTimes
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.usage import group_bytes, run_share
from octavo.observe.stats import (
    MAX_LISTED_REQUESTS,
    MAX_TENANTS,
    OTHER_TENANTS,
    EngineStats,
    GroupUsage,
    SequenceNow,
    TenantUsage,
)
from octavo.request import NAMED
from octavo.scheduler import Scheduler
from octavo.scheduler.sequence import Sequence

TENANT_CHARS = 12
"""Of a tenant without a name in figures: it is a digest, which these tell apart."""


def engine_stats(
    scheduler: Scheduler,
    plan: MemoryPlan,
    times: StepTimes,
    experts: ExpertLoad,
    is_caching: bool,
    is_detailed: bool,
) -> EngineStats:
    """Returns the figures of an engine; `is_detailed`: each expert's and each sequence's too."""
    manager = scheduler.manager
    pools = manager.pools
    running, waiting = scheduler.running, scheduler.waiting
    counters = asdict(scheduler.counters)
    return EngineStats(
        num_running=len(running),
        num_waiting=len(waiting),
        num_blocks=pools.num_pages,
        num_used_blocks=pools.num_referenced,
        num_cached_blocks=pools.num_cached,
        waste_share=scheduler.waste_share,
        run_share=run_share(manager),
        **counters,
        step_seconds=times.seconds,
        step_seconds_counts=tuple(times.counts),
        expert_imbalance=experts.imbalance(),
        expert_counts=experts.counts if is_detailed else (),
        groups=_groups(scheduler, plan),
        tenants=tenant_usage(scheduler),
        sequences=_sequences(running, waiting) if is_detailed else (),
        cache_config={
            "block_size": str(plan.block_size),
            "num_gpu_blocks": str(plan.num_blocks),
            "cache_dtype": ", ".join(dict.fromkeys(g.spec.formats for g in plan.groups)),
            "enable_prefix_caching": str(is_caching),
        },
    )


def _groups(scheduler: Scheduler, plan: MemoryPlan) -> tuple[GroupUsage, ...]:
    used = group_bytes(scheduler.manager, _rows(scheduler.running))
    return tuple(
        GroupUsage(
            name=str(group.spec.visibility),
            num_layers=len(group.layers),
            formats=group.spec.formats,
            used_bytes=size,
        )
        for group, size in zip(plan.groups, used, strict=True)
    )


def _rows(sequences: Iterable[Sequence]) -> list[int]:
    return [one.row for one in sequences if one.row is not None]


def shown_tenant(tenant: str) -> str:
    """Returns how figures call a tenant: by its name, or by the beginning of its digest."""
    name = tenant.removeprefix(NAMED)
    return name if name != tenant else tenant[:TENANT_CHARS]


def tenant_usage(scheduler: Scheduler) -> tuple[TenantUsage, ...]:
    """Returns who has something here, the largest first, the smallest in one."""
    running: dict[str, list[Sequence]] = {}
    waiting: dict[str, int] = {}
    for sequence in scheduler.running:
        running.setdefault(sequence.request.tenant, []).append(sequence)
    for sequence in scheduler.waiting:
        tenant = sequence.request.tenant
        waiting[tenant] = waiting.get(tenant, 0) + 1
    found = [
        TenantUsage(
            tenant=shown_tenant(tenant),
            num_running=len(running.get(tenant, ())),
            num_waiting=waiting.get(tenant, 0),
            kv_bytes=sum(group_bytes(scheduler.manager, _rows(running.get(tenant, ())))),
        )
        for tenant in {**running, **waiting}
    ]
    found.sort(key=lambda one: (-one.kv_bytes, one.tenant))
    rest = found[MAX_TENANTS:]
    if rest:
        others = TenantUsage(
            tenant=OTHER_TENANTS,
            num_running=sum(one.num_running for one in rest),
            num_waiting=sum(one.num_waiting for one in rest),
            kv_bytes=sum(one.kv_bytes for one in rest),
        )
        found[MAX_TENANTS:] = [others]
    return tuple(found)


def _sequences(
    running: PySequence[Sequence], waiting: PySequence[Sequence]
) -> tuple[SequenceNow, ...]:
    now = time.monotonic()
    first = [*running[:MAX_LISTED_REQUESTS], *waiting[:MAX_LISTED_REQUESTS]][:MAX_LISTED_REQUESTS]
    return tuple(
        SequenceNow(
            request_id=one.request.request_id,
            index=one.index,
            tenant=shown_tenant(one.request.tenant),
            is_running=one.row is not None,
            prompt_len=one.prompt_len,
            num_computed=one.num_computed,
            num_cached_tokens=one.num_cached_tokens,
            num_outputs=one.num_outputs,
            max_outputs=one.max_len - one.prompt_len,
            num_preemptions=one.num_preemptions,
            age_seconds=round(now - one.request.arrival_time, 3),
        )
        for one in first
    )
