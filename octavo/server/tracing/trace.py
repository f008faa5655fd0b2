"""The spans of one request, made when it ends from the times that were noted on its way.

    POST /v1/chat/completions        HTTP, to the end of the stream
    |-- tokenise                     texts to ids
    `-- chat MODEL                   one for each prompt: arrival to last token
        |-- queue                    arrival to first step; event cache.lookup
        |-- prefill                  one for each chunk, also those after a preemption
        `-- decode                   first token to last; events preempted

Nothing is done for a token: the tracer sees a request twice, when it comes and when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode, Tracer, set_span_in_context

from octavo.moments import Moment
from octavo.observe.metrics import RequestTrack
from octavo.request import Request, SamplingParams

_OPERATIONS = {"/v1/completions": "text_completion"}
_CHAT = "chat"


class RequestTrace:
    """One HTTP exchange and what the engine did for it."""

    def __init__(self, tracer: Tracer, span: Span, model_name: str, path: str) -> None:
        self._tracer = tracer
        self._span = span
        self._model_name = model_name
        self._operation = _OPERATIONS.get(path, _CHAT)
        self._children = set_span_in_context(span, Context())
        self._offset = time.time_ns() - time.monotonic_ns()

    def _at(self, seconds: float) -> int:
        """Returns nanoseconds since 1970 of a time of the monotonic clock."""
        return int(seconds * 1e9) + self._offset

    def _add(
        self,
        name: str,
        start: float,
        end: float,
        parent: Context,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        span = self._tracer.start_span(
            name, parent, attributes=attributes, start_time=self._at(start)
        )
        span.end(self._at(max(start, end)))

    def add_tokenising(self, start: float, end: float) -> None:
        """Texts have become ids."""
        self._add("tokenise", start, end, self._children)

    def add_request(self, request: Request, track: RequestTrack, reason: str) -> None:
        """A request of the engine has ended."""
        operation, now = self._operation, time.monotonic()
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "octavo",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.usage.input_tokens": request.prompt_len,
            "gen_ai.usage.output_tokens": track.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": track.num_cached_tokens,
            "gen_ai.response.finish_reasons": (reason,),
            "gen_ai.latency.e2e": now - request.arrival_time,
            **_asked(request.params),
        }
        scheduled, first = track.scheduled_time, track.first_token_time
        if scheduled is not None:
            attributes["gen_ai.latency.time_in_queue"] = scheduled - request.arrival_time
        if first is not None:
            attributes["gen_ai.latency.time_to_first_token"] = first - request.arrival_time
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            self._children,
            attributes=attributes,
            start_time=self._at(request.arrival_time),
        )
        if reason == "error":
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", "engine_error")
        inside = set_span_in_context(span, Context())
        self._add("queue", request.arrival_time, now if scheduled is None else scheduled, inside)
        for moment in track.moments:
            self._add_moment(span, moment, inside)
        if first is not None:
            tokens = {"octavo.tokens": track.num_tokens}
            self._add("decode", first, track.last_token_time, inside, tokens)
        span.add_event("finish", {"octavo.finish_reason": reason}, self._at(now))
        span.end(self._at(now))

    def _add_moment(self, span: Span, moment: Moment, inside: Context) -> None:
        if moment.kind == "prefill":
            tokens = {"octavo.first_token": moment.first, "octavo.tokens": moment.count}
            self._add("prefill", moment.start, moment.end, inside, tokens)
        elif moment.kind == "lookup":
            found: dict[str, Any] = {
                "octavo.tokens": moment.first,
                "octavo.cached_tokens": moment.count,
                "octavo.is_hit": moment.count > 0,
            }
            if moment.detail:
                found["octavo.miss_reason"] = moment.detail
            span.add_event("cache.lookup", found, self._at(moment.start))
        else:
            lost = {"octavo.tokens": moment.count}
            span.add_event("preempted", lost, self._at(moment.start))

    def end(self, method: str, route: str | None, status: int) -> None:
        """The answer is out, or broke off with `status`."""
        span = self._span
        if route is not None:
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()


def _asked(params: SamplingParams) -> dict[str, Any]:
    """Returns what the client asked for, as attributes."""
    found: dict[str, Any] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": params.n,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if params.top_k:
        found["gen_ai.request.top_k"] = params.top_k
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    return found
