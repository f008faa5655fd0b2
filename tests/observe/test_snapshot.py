"""Numbers of several processes are added up as if one had observed them all."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from octavo.observe.metrics import Metrics
from octavo.observe.stats import EngineStats
from octavo.outputs import OutputDelta
from octavo.request import Request, SamplingParams, pack_ids


def observe(metrics: Metrics, gaps: list[float], handler: str) -> None:
    request = Request(request_id="r", packed_prompt=pack_ids([1]), params=SamplingParams())
    track, now = metrics.track(request), 1.0
    track.observe(OutputDelta(index=0, token_ids=(7,), time=now))
    for gap in gaps:
        now += gap
        track.observe(OutputDelta(index=0, token_ids=(7,), time=now))
    track.end("stop" if len(gaps) > 1 else "length")
    metrics.observe_http(handler, "GET", 200, 0.1)


def values(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith(("_created", "latency_seconds_sum", "latency_seconds_bucket"))
        and "e2e" not in sample.name
    }


def test_the_sum_is_what_one_process_would_tell():
    one, first, second = (Metrics("m", 100) for _ in range(3))
    for metrics in (one, first):
        observe(metrics, [0.011, 0.5], "/x")
    for metrics in (one, second):
        observe(metrics, [0.02], "/y")
        observe(metrics, [3.0, 0.01], "/x")
    stats = EngineStats(num_running=3, num_generation_tokens=9)
    wanted, found = values(one.render(stats)), values(first.render(stats, [second.snapshot()]))
    times = ("time_to_first", "request_inference", "request_decode", "request_time_per", "http_req")
    inexact = [key for key in wanted if any(part in key[0] for part in times)]
    assert set(found) == set(wanted)
    for key in set(wanted) - set(inexact):
        assert found[key] == wanted[key], key
    labels = frozenset({"model_name": "m", "engine": "0"}.items())
    assert found["vllm:inter_token_latency_seconds_count", labels] == 5
    assert found["vllm:num_requests_running", labels] == 3, "the engine is one"


def test_without_siblings_nothing_is_added():
    metrics = Metrics("m", 100)
    observe(metrics, [0.01], "/x")
    assert metrics.render(None) == metrics.render(None, [])
