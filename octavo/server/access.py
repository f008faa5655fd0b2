"""Around every HTTP exchange: its id, its metrics and one log line.

The outermost middleware of the app. Never logs bodies, headers or query strings; of an error it
logs what the client is told.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.observe.metrics import Metrics
from octavo.server.audit import AuditLog
from octavo.server.drain import PROBES
from octavo.server.errors import error_response
from octavo.server.exchange import Exchange, client_of
from octavo.server.headers import header
from octavo.server.message_errors import is_message_path
from octavo.server.tracing.middleware import CLIENT_CLOSED

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_MAX_ERROR_BYTES = 16384
_MAX_REASON_CHARS = 300


@dataclass(slots=True)
class _Answer:
    """What went to the client."""

    status: int = 0
    is_complete: bool = False
    error: bytes = b""
    """Body of an error."""
    num_bytes: int = 0
    """Of the body, but for streams that are written to their connection."""

    def note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            self.num_bytes += len(message.get("body", b""))
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

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        silent: Collection[str] = (),
        audit: AuditLog | None = None,
    ) -> None:
        """`silent` are paths whose exchanges are not logged; `audit` is told of all but probes."""
        self._app = app
        self._audit = audit
        self._metrics = metrics
        self._silent = frozenset(silent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        exchange, answer = Exchange(request_id), _Answer()
        scope.setdefault("state", {}).update(request_id=request_id, exchange=exchange)
        if self._audit is not None:
            self._audit.begin(exchange)
        headers = [(b"x-request-id", request_id.encode())]
        if is_message_path(scope["path"]):
            headers.append((b"request-id", request_id.encode()))  # where its clients look
            exchange.is_message = True

        def send_with_id(message: Message) -> Awaitable[None]:
            answer.note(message)
            if message["type"] == "http.response.start":
                # A new list: the response may be one that is sent many times.
                message["headers"] = [*message.get("headers", ()), *headers, *exchange.headers]
            return send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # The edge of the process: what no handler expected is logged and told as a 500.
            logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
            if answer.status:
                exchange.reason = "an internal error broke it off"
                raise
            await error_response(error, scope)(scope, receive, send_with_id)
        finally:
            self._record(scope, exchange, answer)

    def _record(self, scope: Scope, exchange: Exchange, answer: _Answer) -> None:
        handler, method = _labels(scope)
        status = answer.status if answer.is_complete else CLIENT_CLOSED
        seconds = time.monotonic() - exchange.started
        self._metrics.observe_http(handler, method, status, seconds)
        if self._audit is not None and scope["path"] not in PROBES:
            record = functools.partial(
                self._audit.record,
                exchange,
                scope,
                route=handler,
                status=status,
                seconds=seconds,
                num_bytes=answer.num_bytes,
            )
            if exchange.is_going_on:
                exchange.later = record
            else:
                record()
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if scope["path"] in self._silent or not logger.isEnabledFor(level):
            return
        extra = {
            "request_id": exchange.request_id,
            "client": client_of(scope),
            "method": method,
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
        }
        words = _note_details(extra, exchange, answer)
        line = (extra["client"], method, scope["path"], status, seconds, words)
        # Made here, since a logger would first look for the place of the call.
        record = logging.LogRecord(
            logger.name, level, __file__, 0, "%s %s %r %d in %.3f s%s", line, None
        )
        record.__dict__.update(extra)
        logger.handle(record)


def _labels(scope: Scope) -> tuple[str, str]:
    """Returns route and method of an exchange. What clients invent adds none to those that there
    are: a method that a route has not is one of no route."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    route = scope.get("route")
    if route is None or method not in (route.methods or ()):
        return "none", method
    return route.path, method


def _request_id(scope: Scope) -> str:
    """Returns the id that the client sent, or a new one."""
    given = header(scope, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


def _note_details(extra: dict[str, Any], exchange: Exchange, answer: _Answer) -> str:
    """Adds what is known beyond the status to `extra`, under its names in JSON lines; returns the
    same for people."""
    words = ""
    if exchange.num_prompt_tokens is not None:
        extra["prompt_tokens"] = prompt = exchange.num_prompt_tokens
        extra["cached_tokens"] = cached = exchange.num_cached_tokens
        extra["output_tokens"] = output = exchange.num_output_tokens
        words = f", prompt {prompt} tokens ({cached} cached), output {output}"
    if exchange.first_token_seconds is not None:
        extra["first_token_seconds"] = round(exchange.first_token_seconds, 6)
        words += f", first after {exchange.first_token_seconds:.3f} s"
    reason = exchange.reason or answer.reason()
    if not answer.is_complete:
        reason = reason or "the client left before the end"
    if reason:
        extra["reason"] = reason = reason[:_MAX_REASON_CHARS]
        # A client's words may be in it: one line, whatever they are.
        words += ": " + reason.encode("unicode_escape").decode()
    return words
