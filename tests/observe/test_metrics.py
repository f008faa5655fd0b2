"""The exposition: vLLM's exact names, both prefixes, and numbers that follow their sources."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.observe.metrics import Metrics, token_buckets
from octavo.observe.stats import (
    MAX_TENANTS,
    SCHEDULER_SECONDS_BUCKETS,
    STEP_ROW_BUCKETS,
    STEP_SECONDS_BUCKETS,
    STEP_TOKEN_BUCKETS,
    EngineStats,
    FinishedRequest,
    GroupUsage,
    MissReason,
    TenantUsage,
)
from octavo.outputs import OutputDelta
from octavo.request import FinishReason, Request, SamplingParams, pack_ids
from octavo.server.app import FAMILIES

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

GAUGES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    "cache_config_info",
)
COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens"),
    *("prompt_tokens_cached", "generation_tokens", "request_success"),
)
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_n", "request_params_max_tokens"),
    *("iteration_tokens_total", "time_per_output_token_seconds"),
    *("request_max_num_generation_tokens", "request_prefill_kv_computed_tokens"),
)
CACHE_CONFIG = {"block_size": "16", "num_gpu_blocks": "100"}
OLD = {
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:num_requests_swapped",
    "vllm:cpu_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
}
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_blocks=100,
    num_used_blocks=25,
    waste_share=0.03,
    run_share=0.9,
    prefix_query_tokens=640,
    prefix_hit_tokens=320,
    prefix_miss_tokens={"never_seen": 300, "evicted": 20},
    num_preemptions=1,
    num_recomputed_tokens=17,
    num_splits=6,
    num_lost_steps=2,
    num_prompt_tokens=700,
    num_cached_prompt_tokens=320,
    num_generation_tokens=55,
    num_steps=4,
    num_step_tokens=90_042,
    step_token_counts=(1, 2, *[0] * (len(STEP_TOKEN_BUCKETS) - 2), 1),
    scheduler_seconds=0.25,
    num_step_rows=9,
    step_row_counts=(1, 3, *[0] * (len(STEP_ROW_BUCKETS) - 1)),
    step_scheduler_counts=(4, *[0] * len(SCHEDULER_SECONDS_BUCKETS)),
    step_seconds=1.5,
    step_seconds_counts=(3, 0, 1, *[0] * (len(STEP_SECONDS_BUCKETS) - 2)),
    expert_counts=((5, 6), (7, 8)),
    expert_imbalance=(1.0, 1.5),
    groups=(GroupUsage(name="all tokens", num_layers=2, formats="int8", used_bytes=4096),),
    tenants=(TenantUsage(tenant="abc", num_running=1, num_waiting=2, kv_bytes=2048),),
    cache_config={"block_size": "16"},
)
FINISHED = FinishedRequest(
    finish_reason="stop",
    num_prompt_tokens=10,
    num_cached_tokens=4,
    num_generation_tokens=12,
    max_generation_tokens=7,
    n=2,
    max_tokens=20,
    arrival_time=100.0,
    scheduled_time=101.0,
    first_token_time=103.0,
    finished_time=113.0,
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("m", max_model_len=1000)


def series(metrics: Metrics, stats: EngineStats | None = None) -> Series:
    text = metrics.render(stats).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    return found[(name, frozenset({"model_name": "m", "engine": "0", **labels}.items()))]


def test_every_name_of_vllm_is_there_under_both_prefixes(metrics: Metrics) -> None:
    metrics.observe_finished(FINISHED)
    names = {name for name, _ in series(metrics, STATS)}
    for prefix in ("vllm:", "octavo:"):
        assert {prefix + name for name in GAUGES} <= names
        assert {f"{prefix}{name}_total" for name in COUNTERS} <= names
    for part in ("bucket", "sum", "count"):
        assert {f"vllm:{name}_{part}" for name in HISTOGRAMS} <= names
    assert names >= OLD
    assert not any(name.endswith("_created") for name in names)


def test_what_pickers_and_autoscalers_ask_for_has_its_value(metrics: Metrics) -> None:
    metrics.observe_finished(FINISHED)
    stats = replace(STATS, num_cached_prompt_tokens=320, cache_config=CACHE_CONFIG)
    found = series(metrics, stats)
    assert value(found, "vllm:gpu_prefix_cache_hit_rate") == 0.5
    assert value(found, "vllm:prompt_tokens_recomputed_total") == 17
    for source, tokens in (("local_compute", 380), ("local_cache_hit", 320)):
        assert value(found, "vllm:prompt_tokens_by_source_total", source=source) == tokens
    assert value(found, "vllm:cache_config_info", **CACHE_CONFIG) == 1
    assert value(found, "vllm:request_max_num_generation_tokens_sum") == 7
    assert value(found, "vllm:request_prefill_kv_computed_tokens_sum") == 6
    for name in ("num_requests_swapped", "cpu_cache_usage_perc"):
        assert value(found, f"vllm:{name}") == 0


def test_gaps_between_tokens_have_both_names(metrics: Metrics) -> None:
    track = metrics.track(Request(request_id="r", packed_prompt=b"", params=SamplingParams()))
    for time in (1.0, 1.03):
        track.observe(OutputDelta(index=0, token_ids=(7,), time=time))
    found = series(metrics)
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert value(found, f"vllm:{name}_sum") == pytest.approx(0.03)
        assert value(found, f"vllm:{name}_bucket", le="0.05") == 1


def test_the_longest_sequence_of_a_request_is_told(metrics: Metrics) -> None:
    params = SamplingParams(n=2)
    track = metrics.track(Request(request_id="r", packed_prompt=b"", params=params))
    for index, count in ((0, 1), (1, 3), (0, 1), (1, 1)):
        track.observe(OutputDelta(index=index, token_ids=(7,) * count, time=1.0))
    track.end("stop")
    assert value(series(metrics), "vllm:request_max_num_generation_tokens_sum") == 4


def test_steps_groups_tenants_and_experts_are_told(metrics: Metrics) -> None:
    found = series(metrics, STATS)
    assert value(found, "octavo:step_seconds_sum") == 1.5
    assert value(found, "octavo:step_seconds_bucket", le="0.001") == 3
    assert value(found, "octavo:step_seconds_count") == 4
    assert value(found, "octavo:step_sequences_sum") == 9
    assert value(found, "octavo:step_scheduling_seconds_count") == 4
    group = {"group": "0", "sees": "all tokens", "formats": "int8"}
    assert value(found, "octavo:kv_cache_group_bytes", **group) == 4096
    assert value(found, "octavo:tenant_kv_cache_bytes", tenant="abc") == 2048
    assert value(found, "octavo:tenant_sequences", tenant="abc", state="waiting") == 2
    assert value(found, "octavo:moe_expert_imbalance", layer="1") == 1.5


def test_a_page_stays_under_100_kilobytes_however_much_there_is_to_tell(metrics: Metrics) -> None:
    large = Metrics("organisation/model-235B-A22B", 262_144)
    for family in FAMILIES:
        for route in family.router.routes:
            for method in route.methods:
                for status in (200, 404, 503):
                    large.observe_http(route.path, method, status, 0.01)
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "other"):
        large.observe_http("none", method, 404, 0.01)
    for reason in FinishReason:
        large.observe_finished(msgspec.structs.replace(FINISHED, finish_reason=reason))
    usage = (f"tenant-{i:05}" for i in range(MAX_TENANTS + 1))
    stats = replace(
        STATS,
        expert_counts=(),
        expert_imbalance=(1.2345,) * 94,
        groups=STATS.groups * 6,
        tenants=tuple(replace(STATS.tenants[0], tenant=tenant) for tenant in usage),
        prefix_miss_tokens=dict.fromkeys(get_args(MissReason), 10**9),
    )
    assert len(large.render(stats)) < 100_000


def test_the_engines_numbers_are_rendered_as_they_are(metrics: Metrics) -> None:
    found = series(metrics, STATS)
    assert value(found, "vllm:num_requests_running") == 3
    assert value(found, "vllm:kv_cache_usage_perc") == 0.25
    assert value(found, "vllm:gpu_cache_usage_perc") == 0.25
    assert value(found, "vllm:prefix_cache_hits_total") == 320
    assert value(found, "vllm:gpu_prefix_cache_hits_total") == 320
    assert value(found, "octavo:kv_cache_waste_perc") == 0.03
    assert value(found, "octavo:kv_cache_run_perc") == 0.9
    assert value(found, "octavo:recomputed_tokens_total") == 17
    assert value(found, "octavo:step_splits_total") == 6
    assert value(found, "octavo:out_of_memory_steps_total") == 2
    assert value(found, "octavo:steps_total") == 4
    assert value(found, "octavo:step_scheduler_seconds_total") == 0.25
    assert value(found, "octavo:prefix_cache_misses_total", reason="evicted") == 20
    assert value(found, "octavo:moe_expert_tokens_total", layer="1", expert="0") == 7
    assert value(found, "vllm:cache_config_info", block_size="16") == 1


def test_step_tokens_are_a_cumulative_histogram(metrics: Metrics) -> None:
    found = series(metrics, STATS)
    buckets = [
        value(found, "vllm:iteration_tokens_total_bucket", le=le)
        for le in ("1.0", "8.0", "16384.0", "+Inf")
    ]
    assert buckets == [1, 3, 3, 4]
    assert value(found, "vllm:iteration_tokens_total_count") == 4
    assert value(found, "vllm:iteration_tokens_total_sum") == 90_042


def test_the_last_numbers_stay_when_the_engine_is_dead(metrics: Metrics) -> None:
    series(metrics, STATS)
    assert value(series(metrics, None), "vllm:num_requests_running") == 3


def test_the_times_of_a_request_are_split_at_its_first_step_and_token(metrics: Metrics) -> None:
    metrics.observe_finished(FINISHED)
    found = series(metrics)
    for name, seconds in (
        ("e2e_request_latency_seconds", 13),
        ("request_queue_time_seconds", 1),
        ("request_prefill_time_seconds", 2),
        ("request_decode_time_seconds", 10),
        ("request_inference_time_seconds", 12),
        ("request_time_per_output_token_seconds", 2),
    ):
        assert value(found, f"vllm:{name}_sum") == seconds, name
    assert value(found, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(found, "vllm:request_params_max_tokens_sum") == 20


def test_a_tracked_request_counts_once_whatever_its_end(metrics: Metrics) -> None:
    request = Request(
        request_id="r",
        packed_prompt=pack_ids([1] * 5),
        params=SamplingParams(max_tokens=4),
        arrival_time=10.0,
    )
    track = metrics.track(request)
    track.observe(OutputDelta(index=0, token_ids=(7,), time=10.5, scheduled_time=10.25))
    track.observe(OutputDelta(index=0, time=10.6))
    track.observe(OutputDelta(index=0, token_ids=(7,), time=10.52, finish_reason="length"))
    assert (track.num_tokens, track.first_token_seconds) == (2, 0.5)
    track.end("length")
    broken = metrics.track(request)
    broken.observe(OutputDelta(index=0, token_ids=(7,), time=11.0))
    broken.end("error")
    metrics.track(request).end("abort")
    found = series(metrics)
    for reason in ("length", "error", "abort"):
        assert value(found, "octavo:request_success_total", finished_reason=reason) == 1
    assert value(found, "vllm:e2e_request_latency_seconds_count") == 3
    assert value(found, "vllm:time_to_first_token_seconds_count") == 2
    assert value(found, "vllm:time_to_first_token_seconds_sum") == 1.5
    assert value(found, "vllm:request_generation_tokens_sum") == 3
    assert value(found, "vllm:request_queue_time_seconds_sum") == 0.25
    gaps = "vllm:inter_token_latency_seconds"
    assert value(found, f"{gaps}_count") == 1
    assert value(found, f"{gaps}_sum") == pytest.approx(0.02)
    buckets = [value(found, f"{gaps}_bucket", le=le) for le in ("0.01", "0.025", "+Inf")]
    assert buckets == [0, 1, 1]


def test_sequences_of_one_request_that_come_together_are_no_gap(metrics: Metrics) -> None:
    request = Request(request_id="r", packed_prompt=pack_ids([1]), params=SamplingParams(n=2))
    track = metrics.track(request)
    for time in (1.0, 2.0):
        for index in range(2):
            track.observe(OutputDelta(index=index, token_ids=(7,), time=time))
    assert value(series(metrics), "vllm:inter_token_latency_seconds_count") == 1


def test_token_buckets_follow_one_two_five() -> None:
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(99) == (1, 2, 5, 10, 20, 50)


def test_two_engines_do_not_mix(metrics: Metrics) -> None:
    other = Metrics("m", max_model_len=1000)
    other.observe_http("/x", "GET", 200, 0.1)
    labels = frozenset({"handler": "/x", "method": "GET", "status": "2xx"}.items())
    assert ("http_requests_total", labels) in series(other)
    assert ("http_requests_total", labels) not in series(metrics)
