"""Prometheus metrics of one engine and its server, under vLLM's names and ours.

Owned by the server: it observes requests, hands in the engine's newest EngineStats, and renders.
No global registry, so that two engines in one process do not mix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    Metric,
)

from octavo.moments import Moment
from octavo.observe.collectors import (
    BatchCounts,
    FastHistogram,
    GuardCounts,
    GuardNumbers,
    OutcomeCounts,
)
from octavo.observe.engine_families import (
    engine_families,
    fleet_family,
    own_families,
    vllm_aliases,
)
from octavo.observe.logs import num_dropped_lines
from octavo.observe.loop_holds import LoopHoldMonitor
from octavo.observe.pages import Page, called, renamed
from octavo.observe.snapshot import pack, total
from octavo.observe.stats import EngineStats, FinishedRequest
from octavo.outputs import OutputDelta
from octavo.request import Request

PREFIXES = ("vllm:", "octavo:")
LABELS = ("model_name", "engine")

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HTTP_BUCKETS = (0.1, 10.0)
"""Few: every route has them, and requests for text have histograms of their own."""
SAMPLES_BUCKETS = (1, 2, 5, 10, 20)

SECONDS_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival to first token", FIRST_TOKEN_BUCKETS),
    "request_time_per_output_token_seconds": ("Mean time per token", TOKEN_GAP_BUCKETS),
    "e2e_request_latency_seconds": ("Arrival to last token", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("Arrival to first step", REQUEST_BUCKETS),
    "request_inference_time_seconds": ("First step to last token", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("First step to first token", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("First token to last token", REQUEST_BUCKETS),
}
TOKEN_HISTOGRAMS = {
    "request_prompt_tokens": "Prompt tokens of a request",
    "request_generation_tokens": "Generated tokens of a request",
    "request_params_max_tokens": "max_tokens of a request",
    "request_max_num_generation_tokens": "Generated tokens of a request's longest sequence",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that were not cached",
}

COUNTED_AT_ONCE = 32
"""Requests that have ended; all at once takes a third of the time that one by one does."""

GAPS = "inter_token_latency_seconds"
OLD_GAPS = "time_per_output_token_seconds"
"""vLLM's first name of the same, which autoscalers ask for."""


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """Returns 1, 2, 5, 10, 20, 50, ... up to `max_model_len`."""
    found: list[int] = []
    scale = 1
    while scale <= max_model_len:
        found += [scale * m for m in (1, 2, 5) if scale * m <= max_model_len]
        scale *= 10
    return tuple(found)


class Metrics:
    """All series of one engine and the HTTP server before it."""

    def __init__(self, model_name: str, max_model_len: int, engine: str = "0") -> None:
        self._labels = (model_name, engine)
        # Observed once without a prefix, exported under both.
        self._shared = CollectorRegistry()
        tokens = token_buckets(max_model_len)
        self._histograms = {
            name: self._histogram(name, text, buckets)
            for name, (text, buckets) in SECONDS_HISTOGRAMS.items()
        }
        gaps = "Time between outputs of a request"
        self._gaps = self._histogram(GAPS, gaps, TOKEN_GAP_BUCKETS)
        for name, text in TOKEN_HISTOGRAMS.items():
            self._histograms[name] = self._histogram(name, text, tokens)
        self._histograms["request_params_n"] = self._histogram(
            "request_params_n", "n of a request", SAMPLES_BUCKETS
        )
        self._finished = Counter(
            "request_success",
            "Finished requests",
            (*LABELS, "finished_reason"),
            registry=self._shared,
        )
        self._reasons: dict[str, Counter] = {}
        self._ended: list[FinishedRequest] = []
        """That are not counted yet."""
        self._exchanges: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._stats = EngineStats()
        self._http = CollectorRegistry()
        self._http_requests = Counter(
            "http_requests",
            "HTTP exchanges by route, method and class of status",
            ("handler", "method", "status"),
            registry=self._http,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Duration of HTTP exchanges, streams to their end",
            ("handler",),
            registry=self._http,
            buckets=HTTP_BUCKETS,
        )

        dropped = Gauge(
            "octavo:dropped_log_lines",
            "Log lines of the server process that nobody read in time",
            registry=self._http,
        )
        dropped.set_function(num_dropped_lines)

    def watch_traces(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Exports what became of spans from now on."""
        text = "Spans of traces: exported, dropped for want of room, or not taken by a collector"
        self._http.register(OutcomeCounts("octavo:trace_spans", text, counts))

    def watch_audit(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Exports what became of lines of the audit log from now on."""
        text = "Lines of the audit log: taken, or dropped because they could not be written"
        self._http.register(OutcomeCounts("octavo:audit_lines", text, counts))

    def watch_guard(self, gate: GuardNumbers) -> None:
        """Exports what the guard is asked and says from now on."""
        self._http.register(GuardCounts(gate))
        self._http.register(gate.seconds)

    def watch_batches(self, counts: BatchCounts) -> None:
        """Exports what becomes of batches from now on."""
        lines, ended = "Lines of batches by what became of them", "Batches that are over by status"
        self._http.register(OutcomeCounts("octavo:batch_lines", lines, lambda: counts.lines))
        self._http.register(OutcomeCounts("octavo:batches", ended, lambda: counts.ended))
        text = "Batches that are not over"
        gauge = Gauge("octavo:open_batches", text, registry=self._http)
        gauge.set_function(lambda: counts.num_open)

    def watch_loop(self, monitor: LoopHoldMonitor) -> None:
        """Exports the longest hold of the event loop from now on."""
        gauge = Gauge(
            "octavo:event_loop_longest_hold_seconds",
            "CPU time of the callback that held the event loop longest",
            registry=self._http,
        )
        gauge.set_function(lambda: monitor.longest_seconds)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> FastHistogram:
        family = FastHistogram(name, text, buckets, dict(zip(LABELS, self._labels, strict=True)))
        self._shared.register(family)
        return family

    def track(self, request: Request) -> RequestTrack:
        """Returns what times one request."""
        return RequestTrack(self, self._gaps, request)

    def observe(self, name: str, value: float) -> None:
        """Adds `value` to the histogram `name` (without a prefix)."""
        self._histograms[name].observe(value)

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Counts one HTTP exchange. `handler` is a route's template, never a raw path."""
        key = (handler, method, status // 100)
        found = self._exchanges.get(key)
        if found is None:
            # Few: a handler is a route's template and a method one of those that are known.
            found = self._exchanges[key] = (
                self._http_requests.labels(handler, method, f"{status // 100}xx"),
                self._http_seconds.labels(handler),
            )
        found[0].inc()
        found[1].observe(seconds)

    def observe_finished(self, request: FinishedRequest) -> None:
        """Adds a request that has ended, whatever its reason."""
        self._ended.append(request)
        if len(self._ended) >= COUNTED_AT_ONCE:
            self._count_ended()

    def _count_ended(self) -> None:
        ended, self._ended = self._ended, []
        for request in ended:
            self._count(request)

    def _count(self, request: FinishedRequest) -> None:
        reason = request.finish_reason
        finished = self._reasons.get(reason)
        if finished is None:
            finished = self._reasons[reason] = self._finished.labels(*self._labels, reason)
        finished.inc()
        self.observe("request_prompt_tokens", request.num_prompt_tokens)
        self.observe("request_generation_tokens", request.num_generation_tokens)
        self.observe("request_max_num_generation_tokens", request.max_generation_tokens)
        computed = request.num_prompt_tokens - request.num_cached_tokens
        self.observe("request_prefill_kv_computed_tokens", computed)
        self.observe("request_params_n", request.n)
        if request.max_tokens is not None:
            self.observe("request_params_max_tokens", request.max_tokens)
        end, first, start = request.finished_time, request.first_token_time, request.scheduled_time
        self.observe("e2e_request_latency_seconds", end - request.arrival_time)
        if start is not None:
            self.observe("request_queue_time_seconds", start - request.arrival_time)
            self.observe("request_inference_time_seconds", end - start)
        if start is not None and first is not None:
            self.observe("request_prefill_time_seconds", first - start)
        if first is not None:
            self.observe("request_decode_time_seconds", end - first)
            gaps = request.num_generation_tokens // request.n - 1
            if gaps > 0:
                self.observe("request_time_per_output_token_seconds", (end - first) / gaps)

    def snapshot(self) -> bytes:
        """Returns what this process has observed, for `render` in another."""
        self._count_ended()
        return pack([*self._shared.collect(), *self._http.collect()])

    def render(self, stats: EngineStats | None, siblings: Sequence[bytes] = ()) -> bytes:
        """Returns the exposition text. None keeps the engine's last numbers (it has died);
        `siblings` are snapshots of the other front processes, which are added."""
        if stats is not None:
            self._stats = stats
        self._count_ended()
        shared, http = list(self._shared.collect()), list(self._http.collect())
        if siblings:
            names = {family.name for family in http}
            families = total([*shared, *http], siblings)
            shared = [family for family in families if family.name not in names]
            http = [family for family in families if family.name in names]
        page = Page([*self._prefixed(shared), *map(renamed, http)])
        return generate_latest(page)  # type: ignore[arg-type]

    def _prefixed(self, shared: Sequence[Metric]) -> Iterable[Metric]:
        """Yields the shared families under every prefix, and the engines' own. Histograms have one
        name: half of a page would be copies."""
        both = [*shared, *self._of_engines(engine_families)]
        for prefix in PREFIXES:
            for family in both:
                if prefix == "vllm:" or family.type != "histogram":
                    yield renamed(family, prefix)
        for family in shared:
            if family.name == GAPS:
                yield renamed(called(family, OLD_GAPS), "vllm:")
        for family in self._of_engines(vllm_aliases):
            yield renamed(family, "vllm:")
        for family in self._of_engines(own_families):
            yield renamed(family, "octavo:")
        yield renamed(fleet_family(self._stats, self._labels[0]), "octavo:")

    def _of_engines(
        self, families: Callable[[EngineStats, Mapping[str, str]], Iterable[Metric]]
    ) -> list[Metric]:
        """Returns the families of one engine, or of all of a fleet, each under its label."""
        model, engine = self._labels
        each = {str(place): one for place, one in enumerate(self._stats.engines)}
        merged: dict[str, Metric] = {}
        for label, stats in (each or {engine: self._stats}).items():
            if stats is None:
                continue
            for family in families(stats, dict(zip(LABELS, (model, label), strict=True))):
                merged.setdefault(family.name, family)
                if merged[family.name] is not family:
                    merged[family.name].samples += family.samples
        return list(merged.values())


class RequestTrack:
    """Times one request from its arrival to `end`, which makes its FinishedRequest."""

    __slots__ = (
        "_gaps",
        "_metrics",
        "_num_tokens_by_index",
        "_request",
        "first_token_time",
        "last_token_time",
        "moments",
        "num_cached_tokens",
        "num_tokens",
        "scheduled_time",
    )

    def __init__(self, metrics: Metrics, gaps: FastHistogram, request: Request) -> None:
        self._metrics = metrics
        self._gaps = gaps
        self._request = request
        self.num_tokens = 0
        """Generated so far, by all sequences."""
        self.num_cached_tokens = 0
        self._num_tokens_by_index: dict[int, int] | None = {} if request.params.n > 1 else None
        """Of each sequence, where there are several."""
        self.moments: list[Moment] = []
        """What happened in the engine, if the request is traced."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time = 0.0

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token."""
        return (
            None
            if self.first_token_time is None
            else self.first_token_time - self._request.arrival_time
        )

    def observe(self, delta: OutputDelta) -> None:
        """Notes what was added to one of the sequences."""
        if delta.moments:
            self.moments += delta.moments
        if not delta.token_ids:
            if delta.vector is not None:
                self.scheduled_time = delta.scheduled_time
                self.num_cached_tokens = delta.num_cached_tokens
            return
        if self.first_token_time is None:
            self.last_token_time = self.first_token_time = now = delta.time
            self.scheduled_time = delta.scheduled_time
            self.num_cached_tokens = delta.num_cached_tokens
            self._metrics.observe("time_to_first_token_seconds", now - self._request.arrival_time)
        self.gain(delta, len(delta.token_ids))

    def gain(self, delta: OutputDelta, num_tokens: int) -> None:
        """Notes tokens that a delta told of last, which is not the first."""
        self.num_tokens += num_tokens
        if self._num_tokens_by_index is not None:
            earlier = self._num_tokens_by_index.get(delta.index, 0)
            self._num_tokens_by_index[delta.index] = earlier + num_tokens
        now = delta.time
        if now > self.last_token_time:  # sequences of one request come together
            self._gaps.observe(now - self.last_token_time)
        self.last_token_time = now

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence."""
        by_index = self._num_tokens_by_index
        return max(by_index.values()) if by_index else self.num_tokens

    def end(self, reason: str) -> None:
        """Counts the request as finished."""
        request = self._request
        self._metrics.observe_finished(
            FinishedRequest(
                finish_reason=reason,
                num_prompt_tokens=request.prompt_len,
                num_cached_tokens=self.num_cached_tokens,
                num_generation_tokens=self.num_tokens,
                max_generation_tokens=self._longest,
                n=request.params.n,
                max_tokens=request.params.max_tokens,
                arrival_time=request.arrival_time,
                finished_time=time.monotonic(),
                scheduled_time=self.scheduled_time,
                first_token_time=self.first_token_time,
            )
        )
