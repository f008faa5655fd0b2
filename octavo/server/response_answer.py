"""One response on its way: from what the engine tells to items, events and the response object.

Used by `routes.responses`, whole or streamed. Never waits for the engine.
"""

from __future__ import annotations

import bisect
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.request import FinishReason, PositionLogprobs
from octavo.server.answers import Usage
from octavo.server.call import Call
from octavo.server.errors import ApiError, error_body
from octavo.server.logprobs import TokenSpelling, chat_logprobs
from octavo.server.pieces import Lazy, pieces_of
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_output import (
    COMPLETED,
    IN_PROGRESS,
    INCOMPLETE,
    Event,
    OutputItems,
    Positions,
)
from octavo.server.state import ServerState
from octavo.tools.answers import AnswerDelta, AnswerReading

FAILED, CANCELLED = "failed", "cancelled"
_KEY_BYTES = 16
_INCOMPLETE = {
    FinishReason.LENGTH.value: "max_output_tokens",
    FinishReason.CONTENT_FILTER.value: "content_filter",
}
"""Why a response has not all that it might have, by why its sequence ended."""


class CancelledResponseError(ApiError):
    """Somebody ended a response, its client or whoever may."""

    def __init__(self) -> None:
        super().__init__(409, "the response was cancelled", code="response_ended")


class ResponseAnswer:
    """The answer to one request."""

    def __init__(
        self,
        state: ServerState,
        body: ResponsesRequest,
        call: Call,
        reading: AnswerReading | None,
    ) -> None:
        key = secrets.token_hex(_KEY_BYTES)
        self.id = f"resp_{key}"
        self.status = IN_PROGRESS
        self.is_stored = False
        self.is_begun = False
        """Whether the engine has told anything."""
        self._state, self._body, self._call = state, body, call
        self._reader = None if reading is None else reading.begin()
        self._usage = Usage.of(call)
        self._items = OutputItems(key, self._logprobs, body.includes_packed_reasoning)
        self._positions: list[PositionLogprobs] = []
        """Of tokens whose text is held back until it is known what it belongs to."""
        self._completed_at: int | None = None
        self._error: dict[str, Any] | None = None
        self._incomplete: str | None = None

    def take(self, new: OutputDelta) -> Iterator[Event]:
        """Yields the events of what the answer gained."""
        self._usage.add(new, not self.is_begun)
        self.is_begun = True
        self._positions.extend(new.logprobs)
        for step in self._steps(new):
            yield from self._items.add(step, self._positions_of(step.content))
        if new.finish_reason is not None:
            self._incomplete = _INCOMPLETE.get(new.finish_reason)
            status = COMPLETED if self._incomplete is None else INCOMPLETE
            yield from self._ended(status)

    def fail(self, error: Exception) -> Iterator[Event]:
        """Yields the events of an answer that breaks off: all but the last one."""
        yield from self._items.finish(INCOMPLETE)
        if isinstance(error, CancelledResponseError):
            self.status = CANCELLED
            return
        self.status = FAILED
        told = error_body(error)["error"]
        self._error = {"code": "server_error", "message": told["message"]}
        names = ("code", "message", "param")
        yield {"type": "error", **{name: told[name] for name in names}}

    def response(self) -> dict[str, Any]:
        """Returns the response object as it stands."""
        body, params = self._body, self._call.params
        is_over = self.status in (COMPLETED, INCOMPLETE)
        reason = {"reason": self._incomplete} if self.status == INCOMPLETE else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._call.created,
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": reason,
            "background": bool(body.background),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._state.model_name,
            "output": self._items.bodies(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning_json,
            "service_tier": "default",
            "store": self.is_stored,
            "temperature": params.temperature,
            "text": body.text_json,
            "tool_choice": body.tool_choice or "auto",
            "tools": msgspec.Raw(body.tools_json),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage_body() if is_over else None,
        }

    def _ended(self, status: str) -> Iterator[Event]:
        yield from self._items.finish(status)
        self.status = status
        self._completed_at = int(time.time()) if status == COMPLETED else None

    def _steps(self, new: OutputDelta) -> list[AnswerDelta]:
        """Returns what is new in the order in which it was written, one kind a step."""
        reader = self._reader
        if reader is None:
            return [AnswerDelta(content=new.text)] if new.text else []
        num_before = reader.num_reasoning_tokens
        steps: list[AnswerDelta] = []
        for step in reader.push_in_order(new.text, new.token_ids, new.finish_reason):
            is_empty = not (step.content or step.reasoning or step.calls)
            if not (is_empty or (steps and _joined(steps[-1], step))):
                steps.append(step)
        self._usage.add_reasoning(reader.num_reasoning_tokens - num_before)
        return steps

    def _positions_of(self, text: str) -> Positions:
        """Returns the log-probabilities of a text's tokens, and forgets those before; what a
        reader held back until it knew what it was comes later than its token."""
        positions = self._positions
        if not (text and positions):
            return ()
        token_bytes, wanted = self._state.engine.tokenizer.token_bytes, text.encode()
        spelled = [token_bytes(one[0].token_id) for one in positions]
        ends = list(itertools.accumulate(map(len, spelled)))
        begin = b"".join(spelled).rfind(wanted)
        if begin < 0:  # bytes that are no text
            self._positions = []
            return positions
        first = bisect.bisect_right(ends, begin)
        last = bisect.bisect_left(ends, begin + len(wanted)) + 1
        self._positions = positions[last:]
        return positions[first:last]

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.num_prompt,
            "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
            "output_tokens": usage.num_generated,
            "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
            "total_tokens": usage.num_prompt + usage.num_generated,
        }

    def _logprobs(self, positions: Positions) -> Lazy | list[Any]:
        if not positions:
            return []
        spelling = TokenSpelling(self._state.engine.tokenizer)
        return chat_logprobs(positions, self._body.top_logprobs or 0, spelling)["content"]


class ResponseEvents:
    """Writes a streamed response as server-sent events."""

    def __init__(
        self,
        answer: ResponseAnswer,
        body: ResponsesRequest,
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_end` is waited for before the last event of an answer that ended by itself."""
        self._answer = answer
        self._on_end = on_end
        self._num_events = 0
        self.is_brief = not body.includes_logprobs

    def events(self, news: list[News]) -> bytes | Iterator[bytes]:
        """Returns the events of one round; in pieces if they tell of each token."""
        pieces = self._pieces(news)
        return b"".join(pieces) if self.is_brief else pieces

    async def end(self) -> bytes:
        await self._on_end()
        return b"".join(self._last())

    def failure(self, error: Exception) -> bytes:
        pieces = [piece for event in self._answer.fail(error) for piece in self._encoded(event)]
        return b"".join([*pieces, *self._last()])

    def _pieces(self, news: list[News]) -> Iterator[bytes]:
        if not self._num_events:
            for kind in ("created", "in_progress"):
                yield from self._lifecycle(kind)
        for _, delta, _ in news:
            for event in self._answer.take(delta):
                yield from self._encoded(event)

    def _last(self) -> Iterator[bytes]:
        status = self._answer.status
        # There is no event of its own for a response that was cancelled.
        yield from self._lifecycle(INCOMPLETE if status == CANCELLED else status)

    def _lifecycle(self, kind: str) -> Iterator[bytes]:
        event = {"type": f"response.{kind}", "response": self._answer.response()}
        yield from self._encoded(event)

    def _encoded(self, event: Event) -> Iterator[bytes]:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        yield b"event: %b\ndata: " % event["type"].encode()
        yield from pieces_of(event)
        yield b"\n\n"


def _joined(last: AnswerDelta, step: AnswerDelta) -> bool:
    """Adds `step` to the one before where both are of one kind; returns whether it did."""
    if step.calls:
        if not last.calls or len(step.calls) > 1 or step.calls[0].name:
            return False
        last.calls[-1].arguments += step.calls[0].arguments
        return True
    if last.calls or bool(last.content) != bool(step.content):
        return False
    last.content += step.content
    last.reasoning += step.reasoning
    return True
