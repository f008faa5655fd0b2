"""Traces: what a collector on a socket receives of requests, and what one that is gone costs."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError
from octavo.moments import Moment
from octavo.observe.metrics import Metrics
from octavo.outputs import OutputDelta
from octavo.request import Request, SamplingParams, pack_ids
from octavo.server.tracing.export import SpanQueue
from octavo.server.tracing.trace import RequestTrace
from octavo.traces_config import is_http
from tests.server.conftest import ServerThread, StartServer
from tests.server.tiny_engine import write_model

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = "01", "00"
CHUNK = 32
SECONDS = 60.0


class Collector:
    """The spans that came, by whichever way."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.endpoint = ""

    def take(self, request: Any) -> None:
        for resource in request.resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert names["service.name"] == "octavo"
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def wait_for(self, name: str, count: int = 1) -> list[Any]:
        """Returns the spans of this name once there are so many."""
        deadline = time.monotonic() + SECONDS
        while True:
            found = [span for span in self.spans if span.name == name]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"no {name} among {[s.name for s in self.spans]}"
            time.sleep(0.02)


def ask(method: str, url: str, **options: Any) -> httpx.Response:
    return httpx.request(method, url, timeout=SECONDS, **options)


@pytest.fixture(scope="module")
def http_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing to say."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    yield collector
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def grpc_collector() -> Iterator[Collector]:
    collector = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            collector.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    collector.endpoint = f"http://127.0.0.1:{port}"
    yield collector
    server.stop(None).wait()


@pytest.fixture(scope="module")
def url(http_collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a real engine that computes prompts in chunks."""
    folder = write_model(tmp_path_factory.mktemp("traced"))
    options = {"device": "cpu", "dtype": "float32", "load_format": "dummy", "num_threads": 1}
    engine = AsyncLLM(
        EngineConfig(model=str(folder), max_num_batched_tokens=CHUNK, **options).resolve()
    )
    config = ServerConfig(
        port=0, otlp_traces_endpoint=http_collector.endpoint, served_model_name=("tiny",)
    )
    server = ServerThread(engine, config)
    yield server.url
    server.end()


def traceparent(flags: str = SAMPLED) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"}


def attributes(one: Any) -> dict[str, Any]:
    """Returns the attributes of a span or an event that travelled."""
    found = {}
    for pair in one.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_a_chat_is_one_trace_with_each_chunk_of_its_prompt(
    url: str, http_collector: Collector
) -> None:
    prompt = "there was a hello world, and it counted. " * 8
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    for _ in range(2):
        answer = ask("POST", f"{url}/v1/chat/completions", json=body, headers=traceparent())
        assert answer.status_code == 200
    outer = http_collector.wait_for("POST /v1/chat/completions", 2)
    for span in outer:
        assert span.trace_id.hex() == TRACE_ID
        assert span.parent_span_id.hex() == PARENT_ID
        assert span.kind == 2  # SERVER
        assert attributes(span)["http.response.status_code"] == 200
        assert attributes(span)["http.route"] == "/v1/chat/completions"
    spans = list(http_collector.spans)
    cold, warm = (
        next(s for s in spans if s.parent_span_id == one.span_id and s.name == "chat tiny")
        for one in outer
    )
    tokenise = [s for s in spans if s.name == "tokenise"]
    assert {s.parent_span_id for s in tokenise} == {s.span_id for s in outer}
    told = attributes(cold)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.request.max_tokens"] == told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < told["gen_ai.latency.time_to_first_token"] < told["gen_ai.latency.e2e"]

    def children(parent: Any, name: str) -> list[Any]:
        return [s for s in spans if s.parent_span_id == parent.span_id and s.name == name]

    num_tokens = told["gen_ai.usage.input_tokens"]
    chunks = [attributes(one) for one in children(cold, "prefill")]
    assert len(chunks) == -(-num_tokens // CHUNK) > 2
    assert [one["octavo.first_token"] for one in chunks] == [*range(0, num_tokens, CHUNK)]
    assert sum(one["octavo.tokens"] for one in chunks) == num_tokens
    [queue], [decode] = children(cold, "queue"), children(cold, "decode")
    assert cold.start_time_unix_nano == queue.start_time_unix_nano
    starts = [queue, *children(cold, "prefill"), decode]
    assert starts == sorted(starts, key=lambda one: one.start_time_unix_nano)
    assert decode.end_time_unix_nano <= cold.end_time_unix_nano
    [lookup] = [one for one in cold.events if one.name == "cache.lookup"]
    assert attributes(lookup)["octavo.miss_reason"] == "never_seen"
    assert not attributes(lookup)["octavo.is_hit"]
    [hit] = [one for one in warm.events if one.name == "cache.lookup"]
    cached = attributes(warm)["gen_ai.usage.cache_read.input_tokens"]
    assert attributes(hit)["octavo.cached_tokens"] == cached == num_tokens // 16 * 16
    assert sum(attributes(s)["octavo.tokens"] for s in children(warm, "prefill")) == (
        num_tokens - cached
    )
    assert [one.name for one in warm.events][-1] == "finish"


def test_completions_and_refusals_are_traced_too(url: str, http_collector: Collector) -> None:
    ask("POST", f"{url}/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2})
    assert len(http_collector.wait_for("text_completion tiny", 2)) == 2
    ask("POST", f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 10**6})
    refused = http_collector.wait_for("POST /v1/completions", 2)[1]
    assert attributes(refused)["http.response.status_code"] == 400
    ask("GET", f"{url}/health")
    ask("GET", f"{url}/v1/models")
    http_collector.wait_for("GET /v1/models")
    assert not [one for one in http_collector.spans if "/health" in one.name]


def test_spans_travel_by_grpc(start_server: StartServer, grpc_collector: Collector) -> None:
    server = start_server(otlp_traces_endpoint=grpc_collector.endpoint)
    ask("POST", f"{server.url}/v1/completions", json={"prompt": "a"}, headers=traceparent())
    [span] = grpc_collector.wait_for("POST /v1/completions")
    assert span.trace_id.hex() == TRACE_ID


def test_who_calls_says_what_is_sampled(
    start_server: StartServer, grpc_collector: Collector
) -> None:
    server = start_server(otlp_traces_endpoint=grpc_collector.endpoint, otlp_traces_sampling=0.0)
    for headers in ({}, traceparent(NOT_SAMPLED)):
        ask("GET", f"{server.url}/version", headers=headers)
    ask("GET", f"{server.url}/v1/models", headers=traceparent())
    grpc_collector.wait_for("GET /v1/models")
    assert len(grpc_collector.spans) == 1


def counts_of(server_url: str) -> dict[str, float]:
    text = ask("GET", f"{server_url}/metrics").text
    return {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "octavo:trace_spans_total"
    }


def test_a_collector_that_is_gone_costs_spans_and_nothing_else(
    start_server: StartServer,
) -> None:
    endpoint = "http://127.0.0.1:9/v1/traces"  # discard: nobody listens there
    server = start_server(otlp_traces_endpoint=endpoint)
    for _ in range(3):
        answer = ask("POST", f"{server.url}/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 200
    deadline = time.monotonic() + SECONDS
    while not counts_of(server.url)["failed"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert counts_of(server.url)["exported"] == 0


class SlowExporter(SpanExporter):
    """Takes spans once it is let."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.num_spans = 0

    def export(self, spans: Any) -> SpanExportResult:
        assert self.may_go.wait(SECONDS)
        self.num_spans += len(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing to do."""


def test_a_slow_collector_fills_a_bounded_queue_and_the_rest_is_counted() -> None:
    exporter = SlowExporter()
    spans = SpanQueue(exporter, max_waiting=10, period_seconds=0.01)
    provider = TracerProvider()
    provider.add_span_processor(spans)
    tracer = provider.get_tracer("test")
    for _ in range(50):
        tracer.start_span("one").end()  # never waits
    assert 30 <= spans.counts["dropped"] <= 40  # ten wait, up to ten are on their way
    exporter.may_go.set()
    provider.shutdown()
    assert spans.counts["exported"] == exporter.num_spans == 50 - spans.counts["dropped"]


def test_an_exporter_that_raises_is_counted() -> None:
    class Broken(SlowExporter):
        def export(self, spans: Any) -> SpanExportResult:
            raise OSError("no")

    spans = SpanQueue(Broken(), period_seconds=0.01)
    provider = TracerProvider()
    provider.add_span_processor(spans)
    provider.get_tracer("test").start_span("one").end()
    provider.shutdown()
    assert spans.counts == {"exported": 0, "dropped": 0, "failed": 1}


@pytest.fixture
def in_memory() -> tuple[Callable[[], RequestTrace], Callable[[], dict[str, ReadableSpan]]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")

    def begin() -> RequestTrace:
        return RequestTrace(tracer, tracer.start_span("POST"), "m", "/v1/messages")

    return begin, lambda: {span.name: span for span in exporter.get_finished_spans()}


def test_preemptions_and_errors_are_events_of_their_request(in_memory: Any) -> None:
    begin, spans = in_memory
    request = Request(
        request_id="r", packed_prompt=pack_ids([1, 2]), params=SamplingParams(), arrival_time=5.0
    )
    track = Metrics("m", 100).track(request)
    moments = (
        Moment("lookup", 6.0, 6.0, 2, 0, "evicted"),
        Moment("prefill", 6.0, 7.0, 0, 2),
        Moment("preempted", 8.0, 8.0, count=2),
    )
    track.observe(
        OutputDelta(index=0, token_ids=(3,), time=7.5, scheduled_time=6.0, moments=moments)
    )
    trace = begin()
    trace.add_request(request, track, "error")
    trace.end("POST", "/v1/messages", 500)
    chat = spans()["chat m"]
    assert [event.name for event in chat.events] == ["cache.lookup", "preempted", "finish"]
    assert chat.events[0].attributes["octavo.miss_reason"] == "evicted"
    assert chat.events[1].attributes["octavo.tokens"] == 2
    assert not chat.status.is_ok
    assert chat.attributes["gen_ai.latency.time_in_queue"] == 1.0
    queue = spans()["queue"]
    assert queue.end_time - queue.start_time == 1_000_000_000
    assert not spans()["POST /v1/messages"].status.is_ok


def test_a_request_that_never_ran_has_a_queue_and_no_decode(in_memory: Any) -> None:
    begin, spans = in_memory
    request = Request(request_id="r", packed_prompt=b"", params=SamplingParams(seed=4, top_k=2))
    trace = begin()
    trace.add_request(request, Metrics("m", 100).track(request), "abort")
    found = spans()
    assert found.keys() == {"queue", "chat m"}
    asked = found["chat m"].attributes
    assert (asked["gen_ai.request.seed"], asked["gen_ai.request.top_k"]) == (4, 2)


@pytest.mark.parametrize(
    ("endpoint", "protocol", "expected"),
    [
        ("http://a:4317", "auto", False),
        ("http://a:4318", "auto", True),
        ("https://a/v1/traces", "auto", True),
        ("http://a:4317", "http", True),
        ("http://a:4318", "grpc", False),
    ],
)
def test_the_endpoint_says_how_spans_travel(endpoint: str, protocol: str, expected: bool) -> None:
    assert is_http(endpoint, protocol) is expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"otlp_traces_endpoint": "localhost:4317"}, "otlp_traces_endpoint"),
        ({"otlp_traces_endpoint": "http://"}, "otlp_traces_endpoint"),
        ({"otlp_traces_sampling": 1.5}, "otlp_traces_sampling"),
        ({"otlp_traces_protocol": "udp"}, "otlp_traces_protocol"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**options).resolve()
