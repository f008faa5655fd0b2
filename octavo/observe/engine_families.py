"""One EngineStats as Prometheus families, without a prefix.

Called by `observe.metrics` at each scrape; a pure function of the snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from octavo.observe.stats import (
    SCHEDULER_SECONDS_BUCKETS,
    STEP_ROW_BUCKETS,
    STEP_SECONDS_BUCKETS,
    STEP_TOKEN_BUCKETS,
    EngineStats,
)

Labels = Mapping[str, str]


def engine_families(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    """Yields what vLLM has under the same name and with the same meaning."""
    yield _gauge("num_requests_running", "Requests in steps", stats.num_running, labels)
    yield _gauge("num_requests_waiting", "Requests that wait", stats.num_waiting, labels)
    yield _gauge("kv_cache_usage_perc", "Used KV blocks, 1 is all", stats.usage_share, labels)
    if stats.cache_config:
        info = {**labels, **stats.cache_config}
        yield _gauge("cache_config_info", "The KV cache's configuration", 1, info)
    for name, text, value in (
        ("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_query_tokens),
        ("prefix_cache_hits", "Prompt tokens found", stats.prefix_hit_tokens),
        ("num_preemptions", "Sequences that gave up their blocks", stats.num_preemptions),
        ("prompt_tokens", "Prompt tokens", stats.num_prompt_tokens),
        ("prompt_tokens_cached", "Prompt tokens from cache", stats.num_cached_prompt_tokens),
        ("generation_tokens", "Generated tokens", stats.num_generation_tokens),
    ):
        yield _counter(name, text, value, labels)
    yield _histogram(
        "iteration_tokens_total",
        "Tokens computed in a step",
        STEP_TOKEN_BUCKETS,
        stats.step_token_counts,
        stats.num_step_tokens,
        labels,
    )


def vllm_aliases(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    """Yields what only vLLM has, old names among them that routers and dashboards still read."""
    for name, text, value in (
        ("gpu_cache_usage_perc", "See kv_cache_usage_perc", stats.usage_share),
        ("gpu_prefix_cache_hit_rate", "Prompt tokens found over those looked up", stats.hit_share),
        ("num_requests_swapped", "Always 0: nothing is swapped", 0),
        ("cpu_cache_usage_perc", "Always 0: nothing is swapped", 0),
    ):
        yield _gauge(name, text, value, labels)
    queries, hits = stats.prefix_query_tokens, stats.prefix_hit_tokens
    yield _counter("gpu_prefix_cache_queries", "See prefix_cache_queries", queries, labels)
    yield _counter("gpu_prefix_cache_hits", "See prefix_cache_hits", hits, labels)
    text = "See recomputed_tokens"
    yield _counter("prompt_tokens_recomputed", text, stats.num_recomputed_tokens, labels)
    cached = stats.num_cached_prompt_tokens
    sources = {"local_compute": stats.num_prompt_tokens - cached, "local_cache_hit": cached}
    text = "Prompt tokens, computed and cached"
    yield _by(CounterMetricFamily, "prompt_tokens_by_source", text, ("source",), sources, labels)


def own_families(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    """Yields what only Octavo counts."""
    yield _gauge("kv_cache_waste_perc", "Empty slots of used blocks", stats.waste_share, labels)
    yield _gauge(
        "kv_cache_run_perc",
        "Blocks of sequences of over 2,000 tokens in runs of 128 tokens or more",
        stats.run_share,
        labels,
    )
    yield _gauge("kv_cache_blocks", "KV blocks in all", stats.num_blocks, labels)
    yield _gauge("kv_cache_cached_blocks", "Free, with a prefix", stats.num_cached_blocks, labels)
    for name, text, value in (
        ("recomputed_tokens", "Computed again after preemption", stats.num_recomputed_tokens),
        ("steps", "Steps", stats.num_steps),
        ("step_splits", "Steps cut in two for lack of memory", stats.num_splits),
        ("out_of_memory_steps", "Steps lost for lack of memory", stats.num_lost_steps),
        ("step_scheduler_seconds", "Time spent scheduling", stats.scheduler_seconds),
    ):
        yield _counter(name, text, value, labels)
    text = "Prompt tokens not found, by reason"
    misses = stats.prefix_miss_tokens
    yield _by(CounterMetricFamily, "prefix_cache_misses", text, ("reason",), misses, labels)
    if stats.num_dropped_events is not None:
        text = "Messages of KV events that found their queue full"
        yield _counter("kv_events_dropped", text, stats.num_dropped_events, labels)
    yield from _steps(stats, labels)
    yield from _usage(stats, labels)
    yield from _experts(stats, labels)


def _steps(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    for name, text, bounds, counts, value in (
        (
            "step_seconds",
            "Time of a step",
            STEP_SECONDS_BUCKETS,
            stats.step_seconds_counts,
            stats.step_seconds,
        ),
        (
            "step_sequences",
            "Sequences in a step",
            STEP_ROW_BUCKETS,
            stats.step_row_counts,
            stats.num_step_rows,
        ),
        (
            "step_scheduling_seconds",
            "Scheduling of a step",
            SCHEDULER_SECONDS_BUCKETS,
            stats.step_scheduler_counts,
            stats.scheduler_seconds,
        ),
    ):
        yield _histogram(name, text, bounds, counts, value, labels)


def _usage(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    groups = {
        (str(place), group.name, group.formats): group.used_bytes
        for place, group in enumerate(stats.groups)
    }
    names = ("group", "sees", "formats")
    text = "KV bytes that running sequences hold, by KV group"
    yield _by(GaugeMetricFamily, "kv_cache_group_bytes", text, names, groups, labels)
    kv = {one.tenant: one.kv_bytes for one in stats.tenants}
    text = "KV bytes that running sequences hold, by tenant"
    yield _by(GaugeMetricFamily, "tenant_kv_cache_bytes", text, ("tenant",), kv, labels)
    counts = {(one.tenant, "running"): one.num_running for one in stats.tenants}
    counts |= {(one.tenant, "waiting"): one.num_waiting for one in stats.tenants}
    text, names = "Sequences of a tenant in the engine", ("tenant", "state")
    yield _by(GaugeMetricFamily, "tenant_sequences", text, names, counts, labels)


def _experts(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    imbalance = {str(layer): share for layer, share in enumerate(stats.expert_imbalance)}
    text = "Tokens of a layer's busiest expert over the mean of all, lately"
    yield _by(GaugeMetricFamily, "moe_expert_imbalance", text, ("layer",), imbalance, labels)
    counts = {
        (str(layer), str(expert)): num_tokens
        for layer, row in enumerate(stats.expert_counts)
        for expert, num_tokens in enumerate(row)
    }
    text, names = "Tokens routed to an expert; with --expert-metrics", ("layer", "expert")
    yield _by(CounterMetricFamily, "moe_expert_tokens", text, names, counts, labels)


def fleet_family(stats: EngineStats, model_name: str) -> Metric:
    """Returns which engines take requests: one of its own, or those of a fleet."""
    family = GaugeMetricFamily(
        "engine_up", "1 while the engine takes requests", labels=["model_name", "engine"]
    )
    for engine, one in enumerate(stats.engines or (stats,)):
        family.add_metric([model_name, str(engine)], float(one is not None))
    return family


def _gauge(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _by(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    names: Sequence[str],
    values: Mapping[Any, float],
    labels: Labels,
) -> Metric:
    """Returns a family with a series for each of `values`, by the values of the labels `names`: a
    text, or a tuple of them where there are several."""
    family = kind(name, text, labels=[*labels, *names])
    for key, value in values.items():
        parts = (key,) if isinstance(key, str) else key
        family.add_metric([*labels.values(), *parts], value)
    return family


def _histogram(
    name: str,
    text: str,
    bounds: Sequence[float],
    counts: Sequence[int],
    value: float,
    labels: Labels,
) -> Metric:
    """Returns a histogram of `counts` by bucket, not cumulative, whose values add up to `value`."""
    counts = counts or (0,) * (len(bounds) + 1)
    ends = [*(str(float(bound)) for bound in bounds), "+Inf"]
    buckets = list(zip(ends, accumulate(counts), strict=True))
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, sum_value=value)
    return family
