"""One trace a request, for `--otlp-traces-endpoint`: makes spans, honours `traceparent`, samples.

Made by `create_app` if it is asked for, and only then imported, for OpenTelemetry is an extra.
Names are those of OpenTelemetry's conventions for HTTP servers and for generative AI.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from octavo import __version__
from octavo.config import ServerConfig
from octavo.server.headers import header
from octavo.server.tracing.export import SpanQueue
from octavo.server.tracing.trace import RequestTrace
from octavo.traces_config import is_http

_TIMEOUT_SECONDS = 5
"""Of one attempt to export."""


class RequestTracer:
    """Begins the trace of each request."""

    def __init__(
        self, config: ServerConfig, model_name: str, exporter: SpanExporter | None = None
    ) -> None:
        """Spans go to the endpoint of `config`, or to `exporter` if one is given."""
        self.queue = SpanQueue(exporter or new_exporter(config))
        resource = Resource.create({"service.name": "octavo", "service.version": __version__})
        sampler = ParentBased(TraceIdRatioBased(config.otlp_traces_sampling))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self.queue)
        self._tracer = self._provider.get_tracer("octavo", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def begin(self, scope: Scope) -> RequestTrace | None:
        """Returns the trace of an HTTP exchange that has just come; None if it is not sampled."""
        sent = {name: header(scope, name.encode()) for name in ("traceparent", "tracestate")}
        carrier = {name: value for name, value in sent.items() if value}
        parent = self._propagator.extract(carrier) if carrier else None
        host, port = scope.get("client") or (None, None)
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
        }
        if host is not None:
            attributes |= {"client.address": host, "client.port": port}
        span = self._tracer.start_span(
            scope["method"], parent, kind=SpanKind.SERVER, attributes=attributes
        )
        if not span.is_recording():
            return None
        return RequestTrace(self._tracer, span, self._model_name, scope["path"])

    @property
    def counts(self) -> Mapping[str, int]:
        """Spans by what became of them."""
        return self.queue.counts

    def close(self) -> None:
        """Sends what waits, for a few seconds at most."""
        self._provider.shutdown()


def new_exporter(config: ServerConfig) -> SpanExporter:
    """Returns what sends spans to the endpoint; nothing is sent before there are some."""
    endpoint = config.otlp_traces_endpoint
    assert endpoint is not None
    # Else a line for every attempt: the queue says once that a collector takes nothing, and counts.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    if is_http(endpoint, config.otlp_traces_protocol):
        path = endpoint if "/v1/" in endpoint else endpoint.rstrip("/") + "/v1/traces"
        return HttpExporter(path, timeout=_TIMEOUT_SECONDS)
    is_plain = not endpoint.startswith("https://")
    return GrpcExporter(endpoint, insecure=is_plain, timeout=_TIMEOUT_SECONDS)
