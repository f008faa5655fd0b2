"""The audit log (`--audit-log FILE`): who asked for what, how much it was, and what was decided.

Made with the app; told of every exchange but probes by `access`, and of lines of batches by
`batches.calls`. A JSON object a line; no word of prompts or answers unless `--audit-log-text`, and
never a key. Never waits: see `observe.file_writer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.types import Scope

from octavo.config import ServerConfig
from octavo.engine.mailbox import Deliver
from octavo.errors import ConfigError
from octavo.observe.file_writer import FileWriter, check_file
from octavo.outputs import OutputDelta
from octavo.server.exchange import Exchange, client_of
from octavo.server.tenants.callers import STRANGER, Caller
from octavo.server.tenants.route_scopes import RouteScopes
from octavo.server.tracing.middleware import CLIENT_CLOSED

MAX_WAITING_BYTES = 64 * 2**20
_LINE_BYTES = 1024
"""About what a line has besides texts."""
_CLOSE_SECONDS = 2.0
_REFUSED_BY = {
    **dict.fromkeys(("invalid_api_key", "ambiguous_key", "issuer_unavailable"), "key"),
    **dict.fromkeys(("missing_scope", "operator_only", "priority_not_allowed"), "scope"),
    **dict.fromkeys(("rate_limit_exceeded", "request_exceeds_budget"), "budget"),
    **dict.fromkeys(("content_filter", "guard_unavailable"), "guard"),
    **dict.fromkeys(("body_too_large", "prompt_too_long", "too_many_messages"), "limit"),
    **dict.fromkeys(("context_length_exceeded", "too_many_lines"), "limit"),
    **dict.fromkeys(("overloaded", "too_many_connections", "engine_busy"), "load"),
    **dict.fromkeys(("shutting_down", "not_ready"), "drain"),
}
"""By the code of an error: who says no."""


class AuditLog:
    """The file, to which all front processes and other servers may add."""

    def __init__(
        self, path: str, model: str, routes: RouteScopes, keeps_texts: bool = False
    ) -> None:
        """`routes` know what a path is that nobody has served. Raises ConfigError if the file
        cannot be opened."""
        self._routes = routes
        self._model = model
        self._keeps_texts = keeps_texts
        try:
            self._writer = FileWriter(path, _lost, MAX_WAITING_BYTES)
        except OSError as error:
            message = f"audit_log {path} cannot be written ({error.strerror}); give another path"
            raise ConfigError(message, field="audit_log") from error

    @property
    def counts(self) -> Mapping[str, int]:
        """Lines by what became of them."""
        return {"taken": self._writer.num_taken, "dropped": self._writer.num_dropped}

    def begin(self, exchange: Exchange) -> None:
        """Has an exchange keep what is to be told of it."""
        if self._keeps_texts:
            exchange.sent, exchange.told = "", {}

    def record(
        self,
        exchange: Exchange,
        scope: Scope,
        *,
        route: str,
        status: int,
        seconds: float,
        num_bytes: int = 0,
    ) -> None:
        """Writes one exchange. `route` is the template of its path, or "none" if it was answered
        before its route was looked for; `num_bytes` are those of an answer that was no stream."""
        caller: Caller = scope["state"].get("caller") or STRANGER
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "tenant": caller.tenant.name,
            "key": caller.name,
            "client": client_of(scope),
            "method": scope["method"],
            "route": self._routes.template(scope["path"]) if route == "none" else route,
            "model": self._model,
            "status": status,
            "seconds": round(seconds, 6),
            **_decision(exchange, status),
        }
        if exchange.num_body_bytes is not None:
            line["body_bytes"] = exchange.num_body_bytes
        if num_bytes:
            line["answer_bytes"] = num_bytes
        if exchange.num_prompt_tokens is not None:
            line["prompt_tokens"] = exchange.num_prompt_tokens
            line["cached_tokens"] = exchange.num_cached_tokens
            line["output_tokens"] = exchange.num_output_tokens
        if exchange.guarded:
            line["guard"] = exchange.guarded
        size = _LINE_BYTES
        if self._keeps_texts:
            told = exchange.told or {}
            line["sent"], line["told"] = exchange.sent, told
            size += len(exchange.sent or "") + sum(
                len(one) for each in told.values() for one in each
            )
        # In the writer's thread: a long text takes milliseconds.
        self._writer.put_later(partial(_text, line), size)

    def close(self) -> None:
        """Writes what waits, for two seconds at most."""
        self._writer.close(_CLOSE_SECONDS)


def kept(told: dict[int, list[str]], n: int, deliver: Deliver) -> Deliver:
    """Returns what delivers the news of prompts with `n` answers each, and keeps their texts."""

    def keep(tag: int, delta: OutputDelta, finished: bool) -> bool:
        if delta.text:
            told.setdefault(tag * n + delta.index, []).append(delta.text)
        return deliver(tag, delta, finished)

    return keep


def check_audit(config: ServerConfig) -> None:
    """Raises ConfigError if there is to be a log, and it cannot be written."""
    if config.audit_log is not None:
        check_file(config.audit_log, "audit_log")


def _decision(exchange: Exchange, status: int) -> dict[str, Any]:
    """Returns what became of an exchange, and who refused it."""
    by_guard = any("refused" in name for name in exchange.guarded or ())
    code = exchange.code
    refused_by = "guard" if by_guard else _REFUSED_BY.get(code, "")
    decision = "served"
    if refused_by:
        decision = "refused"
    elif status == CLIENT_CLOSED:
        decision = "left"
    elif status >= 400:
        decision = "invalid" if status < 500 else "failed"
    elif exchange.reason:
        decision = "broken off"
    found = {"decision": decision}
    return found | {name: one for name, one in (("refused_by", refused_by), ("code", code)) if one}


def _text(line: dict[str, Any]) -> str:
    if told := line.get("told"):
        line["told"] = {index: "".join(pieces) for index, pieces in sorted(told.items())}
    return json.dumps(line) + "\n"


def _lost(count: int) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "dropped_lines": count}) + "\n"
