"""Around every HTTP exchange: its id, its metrics and one log line.

The outermost middleware of the app. Never logs bodies, headers or query strings; of an error it
logs what the client is told.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.observe.metrics import Metrics
from octavo.server.drain import PROBES
from octavo.server.errors import error_response

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""Status in log and metrics of an answer that broke off because its client left."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_MAX_ERROR_BYTES = 16384
_MAX_REASON_CHARS = 300


@dataclass(slots=True)
class Exchange:
    """What the log line tells of one exchange; tokens are those of all prompts and sequences.

    Routes find it as `request.state.exchange` and fill in what they know.
    """

    request_id: str
    num_prompt_tokens: int | None = None
    """Known once a generation has begun."""
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_seconds: float | None = None
    """From the arrival of the first of its prompts that got one."""
    reason: str = ""
    """Why it failed, if its answer had begun by then; else the answer itself tells."""
    started: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Answer:
    """What went to the client."""

    status: int = 0
    is_complete: bool = False
    error: bytes = b""
    """Body of an error."""

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self.status >= 400 and len(self.error) < _MAX_ERROR_BYTES:
                self.error += message.get("body", b"")

    def reason(self) -> str:
        """Returns the message of the error object; empty if the answer is none."""
        if not self.error:
            return ""  # nearly always: not even tried, for an exception costs
        try:
            told = json.loads(self.error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return ""
        return str(told)


class AccessMiddleware:
    """Honours or makes X-Request-Id, counts, times and logs the exchange, answers crashes.

    The id is in `request.state.request_id` and in the response's headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, silent: Collection[str] = ()) -> None:
        """`silent` are paths whose exchanges are not logged."""
        self._app = app
        self._metrics = metrics
        self._silent = frozenset(silent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange, answer = Exchange(request_id), _Answer()
        scope.setdefault("state", {}).update(request_id=request_id, exchange=exchange)

        async def send_with_id(message: Message) -> None:
            answer.note(message)
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # The edge of the process: what no handler expected is logged and told as a 500.
            logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
            if answer.status:
                exchange.reason = "an internal error broke it off"
                raise
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._record(scope, exchange, answer)

    def _record(self, scope: Scope, exchange: Exchange, answer: _Answer) -> None:
        # Templates and known methods only: a label must not grow with what clients invent.
        route = scope.get("route")
        handler = "none" if route is None else route.path
        method = scope["method"] if scope["method"] in _METHODS else "other"
        status = answer.status if answer.is_complete else CLIENT_CLOSED
        seconds = time.monotonic() - exchange.started
        self._metrics.observe_http(handler, method, status, seconds)
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if scope["path"] in self._silent or not logger.isEnabledFor(level):
            return
        host, port = scope.get("client") or ("unknown", 0)
        extra = {
            "request_id": exchange.request_id,
            "client": f"{host}:{port}",
            "method": method,
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
            **dict(_details(exchange, answer)),
        }
        words = "".join(_in_words(extra))
        line = (extra["client"], method, scope["path"], status, seconds, words)
        logger.log(level, "%s %s %r %d in %.3f s%s", *line, extra=extra)


def _details(exchange: Exchange, answer: _Answer) -> Iterator[tuple[str, Any]]:
    """Yields what is known beyond the status, under its name in JSON lines."""
    reason = exchange.reason or answer.reason()
    if not answer.is_complete:
        reason = reason or "the client left before the end"
    if reason:
        yield "reason", reason[:_MAX_REASON_CHARS]
    if exchange.num_prompt_tokens is not None:
        yield "prompt_tokens", exchange.num_prompt_tokens
        yield "cached_tokens", exchange.num_cached_tokens
        yield "output_tokens", exchange.num_output_tokens
    if exchange.first_token_seconds is not None:
        yield "first_token_seconds", round(exchange.first_token_seconds, 6)


def _in_words(extra: dict[str, Any]) -> Iterator[str]:
    """Yields the same for people."""
    if "prompt_tokens" in extra:
        yield f", prompt {extra['prompt_tokens']} tokens ({extra['cached_tokens']} cached)"
        yield f", output {extra['output_tokens']}"
    if "first_token_seconds" in extra:
        yield f", first after {extra['first_token_seconds']:.3f} s"
    if "reason" in extra:
        # A client's words may be in it: one line, whatever they are.
        yield ": " + extra["reason"].encode("unicode_escape").decode()
