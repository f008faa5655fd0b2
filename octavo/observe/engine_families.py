"""One EngineStats as Prometheus families, without a prefix.

Called by `observe.metrics` at each scrape; a pure function of the snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from octavo.observe.stats import STEP_TOKEN_BUCKETS, EngineStats

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
    yield _step_tokens(stats, labels)


def vllm_aliases(stats: EngineStats, labels: Labels) -> Iterator[Metric]:
    """Yields old names of vLLM's that routers and dashboards still read."""
    yield _gauge("gpu_cache_usage_perc", "See kv_cache_usage_perc", stats.usage_share, labels)
    queries, hits = stats.prefix_query_tokens, stats.prefix_hit_tokens
    yield _counter("gpu_prefix_cache_queries", "See prefix_cache_queries", queries, labels)
    yield _counter("gpu_prefix_cache_hits", "See prefix_cache_hits", hits, labels)


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
    misses = CounterMetricFamily(
        "prefix_cache_misses", "Prompt tokens not found, by reason", labels=[*labels, "reason"]
    )
    for reason, num_tokens in stats.prefix_miss_tokens.items():
        misses.add_metric([*labels.values(), reason], num_tokens)
    yield misses
    experts = CounterMetricFamily(
        "moe_expert_tokens", "Tokens routed to an expert", labels=[*labels, "layer", "expert"]
    )
    for layer, counts in enumerate(stats.expert_counts):
        for expert, num_tokens in enumerate(counts):
            experts.add_metric([*labels.values(), str(layer), str(expert)], num_tokens)
    yield experts


def _gauge(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _step_tokens(stats: EngineStats, labels: Labels) -> Metric:
    counts = stats.step_token_counts or (0,) * (len(STEP_TOKEN_BUCKETS) + 1)
    bounds = [*(str(float(bound)) for bound in STEP_TOKEN_BUCKETS), "+Inf"]
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append((bound, total))
    family = HistogramMetricFamily(
        "iteration_tokens_total", "Tokens computed in a step", labels=list(labels)
    )
    family.add_metric(list(labels.values()), buckets, sum_value=stats.num_step_tokens)
    return family
