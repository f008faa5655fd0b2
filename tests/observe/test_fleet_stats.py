"""Numbers of several engines as one."""

from __future__ import annotations

from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from octavo.observe.fleet_stats import total_stats
from octavo.observe.metrics import Metrics
from octavo.observe.stats import (
    MAX_TENANTS,
    OTHER_TENANTS,
    STEP_TOKEN_BUCKETS,
    EngineStats,
    TenantUsage,
)


def tenants(names: list[str]) -> tuple[TenantUsage, ...]:
    return tuple(
        TenantUsage(tenant=name, num_running=1, num_waiting=2, kv_bytes=10 + place)
        for place, name in enumerate(names)
    )


ONE = EngineStats(
    num_running=2,
    num_used_blocks=9,
    num_blocks=20,
    waste_share=0.5,
    prefix_miss_tokens={"evicted": 3},
    step_token_counts=(1,) * (len(STEP_TOKEN_BUCKETS) + 1),
    step_seconds=0.5,
    expert_counts=((1, 2), (3, 4)),
    expert_imbalance=(1.0, 2.0),
    tenants=tenants(["a", "b"]),
    cache_config={"block_size": "16"},
)


def test_one_engine_is_its_own_total():
    assert total_stats([ONE]) == EngineStats(
        **{
            one.name: getattr(ONE, one.name) for one in fields(EngineStats) if one.name != "tenants"
        },
        tenants=ONE.tenants[::-1],  # most memory first
    )
    assert total_stats([]) == EngineStats()


def test_sums_are_sums_and_shares_are_means():
    other = EngineStats(num_running=1, num_used_blocks=29, waste_share=0.1, step_seconds=1.0)
    total = total_stats([ONE, other])
    assert (total.num_running, total.num_used_blocks, total.step_seconds) == (3, 38, 1.5)
    assert abs(total.waste_share - (0.5 * 10 + 0.1 * 30) / 40) < 1e-9
    assert total.expert_counts == ONE.expert_counts
    assert total.expert_imbalance == ONE.expert_imbalance
    assert total.step_token_counts == ONE.step_token_counts
    both = total_stats([ONE, ONE])
    assert both.expert_counts == ((2, 4), (6, 8))
    assert both.prefix_miss_tokens == {"evicted": 6}
    assert {one.tenant: one.num_waiting for one in both.tenants} == {"a": 4, "b": 4}


def test_tenants_beyond_the_limit_are_told_together():
    names = [f"t{i:02}" for i in range(MAX_TENANTS)]
    more = [f"u{i:02}" for i in range(MAX_TENANTS)]
    total = total_stats(
        [
            EngineStats(tenants=(*tenants(names), *tenants([OTHER_TENANTS]))),
            EngineStats(tenants=tenants(more)),
        ]
    )
    assert len(total.tenants) == MAX_TENANTS + 1
    assert total.tenants[-1].tenant == OTHER_TENANTS
    assert sum(one.num_running for one in total.tenants) == 2 * MAX_TENANTS + 1


def test_each_engine_has_its_series_and_one_that_is_down_says_so():
    metrics = Metrics("m", 100)
    total = EngineStats(num_running=3, engines=(ONE, None, EngineStats(num_running=1)))
    page = metrics.render(total).decode()
    families = {one.name: one for one in text_string_to_metric_families(page)}
    up = {s.labels["engine"]: s.value for s in families["octavo:engine_up"].samples}
    assert up == {"0": 1, "1": 0, "2": 1}
    running = {s.labels["engine"]: s.value for s in families["vllm:num_requests_running"].samples}
    assert running == {"0": 2, "2": 1}
    lines = page.splitlines()
    assert lines.count("# TYPE vllm:num_requests_running gauge") == 1
