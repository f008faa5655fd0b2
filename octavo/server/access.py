"""Around every HTTP exchange: its id, its metrics and one log line.

The outermost middleware of the app. Never logs bodies, headers or query strings.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.observe.metrics import Metrics
from octavo.server.errors import error_response

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class AccessMiddleware:
    """Honours or makes X-Request-Id, counts, times and logs the exchange, answers crashes.

    The id is in `request.state.request_id` and in the response's headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # The edge of the process: what no handler expected is logged and told as a 500.
            logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
            if status:
                raise
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status, time.monotonic() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # Templates and known methods only: a label must not grow with what clients invent.
        route = scope.get("route")
        handler = "none" if route is None else route.path
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.observe_http(handler, method, status, seconds)
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        if logger.isEnabledFor(level):
            extra = {
                "request_id": request_id,
                "method": method,
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 6),
            }
            line = (method, scope["path"], status, seconds)
            logger.log(level, "%s %r %d in %.3f s", *line, extra=extra)
