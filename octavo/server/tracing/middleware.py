"""Around every HTTP exchange that is traced: begins its trace, and ends it with its status.

Inside of `access`, whose Exchange carries the trace to the routes. Knows no span.
"""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.observe.metrics import RequestTrack
from octavo.request import Request
from octavo.server.drain import PROBES

CLIENT_CLOSED = 499
"""Status in traces, log and metrics of an answer that broke off because its client left."""


class Trace(Protocol):
    """Where a request's way is noted."""

    def add_tokenising(self, start: float, end: float) -> None: ...

    def add_request(self, request: Request, track: RequestTrack, reason: str) -> None: ...

    def end(self, method: str, route: str | None, status: int) -> None: ...


class Tracer(Protocol):
    """Who begins traces."""

    def begin(self, scope: Scope) -> Trace | None: ...


class TraceMiddleware:
    """Leaves the trace in the exchange; probes and scrapes have none."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        trace = self._tracer.begin(scope)
        if trace is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["exchange"].trace = trace
        status, is_complete = 500, False

        async def noted(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
            await send(message)

        is_failure = True
        try:
            await self._app(scope, receive, noted)
            is_failure = False
        finally:
            route = scope.get("route")
            if not is_complete:
                status = 500 if is_failure else CLIENT_CLOSED
            trace.end(scope["method"], None if route is None else route.path, status)
