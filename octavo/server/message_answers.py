"""Answers in Anthropic's form: blocks of text, thinking and calls, whole or as events of a stream.

Called by `routes.messages`. Plain dicts and bytes, since every streamed token passes here; never
waits, and never holds more of an answer than the block that is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic_core

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.server.answers import Usage
from octavo.server.call import Call
from octavo.server.errors import message_error_body
from octavo.server.protocol.signatures import signature_of
from octavo.tools.answers import AnswerDelta, AnswerReader, AnswerReading, CallDelta

PING_SECONDS = 10.0
"""A stream that had nothing to tell for so long says that it lives."""

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageHead:
    """What is known of an answer before it is there."""

    call: Call
    model: str
    reading: AnswerReading | None
    """None: the answer is text."""
    hides_thinking: bool
    max_tokens: int
    """What the client asked for; the context may have less."""

    def message(self, content: list[Any], usage: Usage) -> dict[str, Any]:
        """Returns a message that has not ended."""
        return {
            "id": self.call.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage(usage),
        }

    def end(self, last: OutputDelta, num_tokens: int, has_calls: bool) -> dict[str, Any]:
        """Returns why an answer ended."""
        reason, sequence = "end_turn", None
        if last.finish_reason == "length":
            is_short = num_tokens < self.max_tokens
            reason = "model_context_window_exceeded" if is_short else "max_tokens"
        elif last.finish_reason == "content_filter":
            reason = "refusal"
        elif isinstance(last.stop_reason, str):
            reason, sequence = "stop_sequence", last.stop_reason
        elif has_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": sequence}


def message_usage(usage: Usage) -> dict[str, Any]:
    """Returns Anthropic's usage object: `input_tokens` are those that were not cached. What is new
    in the cache has no price here and is not told apart."""
    body: dict[str, Any] = {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_generated,
    }
    if usage.num_reasoning:
        body["output_tokens_details"] = {"thinking_tokens": usage.num_reasoning}
    return body


def whole_message(head: MessageHead, sequence: OutputDelta) -> dict[str, Any]:
    """Returns the message of a sequence that has ended."""
    usage = Usage.of(head.call)
    usage.add(sequence, is_first=True)
    reader = None if head.reading is None else head.reading.begin()
    content: list[dict[str, Any]] = []
    for delta in _parts(reader, sequence):
        _extend(content, delta)
    for block in content:
        _finish(block, head.hides_thinking)
    if reader is not None:
        usage.add_reasoning(reader.num_reasoning_tokens)
    has_calls = reader is not None and reader.has_calls
    end = head.end(sequence, usage.num_generated, has_calls)
    return {**head.message(content, usage), **end}


def _parts(reader: AnswerReader | None, new: OutputDelta) -> Iterable[AnswerDelta]:
    """Returns what was added, in order."""
    if reader is None:
        return (AnswerDelta(content=new.text),) if new.text else ()
    return reader.push_in_order(new.text, new.token_ids, new.finish_reason)


def _extend(content: list[dict[str, Any]], delta: AnswerDelta) -> None:
    last = content[-1] if content else {"type": ""}
    for kind, text in (("thinking", delta.reasoning), ("text", delta.content)):
        if text and last["type"] == kind:
            last[kind] += text
        elif text:
            content.append({"type": kind, kind: text})
    for call in delta.calls:
        if call.name:
            content.append(_new_call(call) | {"input": ""})
        content[-1]["input"] += call.arguments


def _finish(block: dict[str, Any], hides_thinking: bool) -> None:
    """Makes a block whole whose texts are."""
    if block["type"] == "thinking":
        block["signature"] = signature_of(block["thinking"], carries_text=hides_thinking)
        block["thinking"] = "" if hides_thinking else block["thinking"]
    elif block["type"] == "tool_use":
        block["input"] = call_input(block["input"])


def call_input(arguments: str) -> dict[str, Any]:
    """Returns the arguments of a call, as far as they came; what is no object stays as it is, under
    the name that Anthropic's documents give it."""
    try:
        found = pydantic_core.from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        found = None
    if not arguments.strip():
        return {}
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def _new_call(call: CallDelta) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


class MessageEvents:
    """Writes the events of one streamed message; see `streaming.EventWriter`.

    message_start, ping, then for each block content_block_start, content_block_delta ...,
    content_block_stop, then message_delta, message_stop; or an error in place of what is left
    """

    is_brief = True

    def __init__(self, head: MessageHead, clock: Callable[[], float] = time.monotonic) -> None:
        self._head = head
        self._reader = None if head.reading is None else head.reading.begin()
        self._usage = Usage.of(head.call)
        self._clock = clock
        self._told_at = 0.0
        """When the client last heard of us."""
        self._blocks = _BlockEvents(head.hides_thinking)
        self._last: OutputDelta | None = None

    def events(self, news: list[News]) -> bytes:
        """Returns the events of one round."""
        is_first = self._last is None
        told = [self._start(news)] if is_first else []
        for place, (_, delta, _) in enumerate(news):
            if not (is_first and place == 0):
                self._usage.add(delta, is_first=False)
            self._last = delta
            for part in _parts(self._reader, delta):
                told += self._blocks.add(part)
        found, now = b"".join(told), self._clock()
        if not found and now - self._told_at >= PING_SECONDS:
            found = _PING
        if found:
            self._told_at = now
        return found

    def _start(self, news: list[News]) -> bytes:
        self._usage.add(news[0][1], is_first=True)
        message = self._head.message([], self._usage)
        return _event("message_start", message=message) + _PING

    async def end(self) -> bytes:
        """Returns what closes the last block and the message."""
        assert self._last is not None, "a sequence has a last delta"
        reader = self._reader
        if reader is not None:
            self._usage.add_reasoning(reader.num_reasoning_tokens)
        has_calls = reader is not None and reader.has_calls
        told = self._head.end(self._last, self._usage.num_generated, has_calls)
        usage = message_usage(self._usage)
        closed = b"".join(self._blocks.close())
        delta = _event("message_delta", delta=told, usage=usage)
        return closed + delta + _event("message_stop")

    def failure(self, error: Exception) -> bytes:
        """Returns the event that ends a stream that fails."""
        return _named("error", message_error_body(error, self._head.call.exchange.request_id))


class _BlockEvents:
    """The blocks of one message, one open at a time."""

    def __init__(self, hides_thinking: bool) -> None:
        self._hides_thinking = hides_thinking
        self._index = -1
        self._kind = ""
        self._thinking: list[str] = []
        """Of the open block: what is signed at its end."""

    def add(self, delta: AnswerDelta) -> Iterator[bytes]:
        if delta.reasoning:
            yield from self._open("thinking", {"thinking": "", "signature": ""})
            self._thinking.append(delta.reasoning)
            if not self._hides_thinking:
                yield self._delta("thinking_delta", "thinking", delta.reasoning)
        if delta.content:
            yield from self._open("text", {"text": ""})
            yield self._delta("text_delta", "text", delta.content)
        for call in delta.calls:
            if call.name:
                yield from self.close()
                yield from self._open("tool_use", {**_new_call(call), "input": {}})
            if call.arguments:
                yield self._delta("input_json_delta", "partial_json", call.arguments)

    def close(self) -> Iterator[bytes]:
        """Ends the open block, if there is one."""
        if not self._kind:
            return
        if self._kind == "thinking":
            text = "".join(self._thinking)
            self._thinking.clear()
            signature = signature_of(text, carries_text=self._hides_thinking)
            yield self._delta("signature_delta", "signature", signature)
        self._kind = ""
        yield _event("content_block_stop", index=self._index)

    def _open(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        if self._kind == kind:
            return
        yield from self.close()
        self._kind = kind
        self._index += 1
        block = {"type": kind, **empty}
        yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return _DELTA % (self._index, _encode(kind), _encode(name), _encode(text))


def _named(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(data))


def _event(kind: str, **fields: Any) -> bytes:
    return _named(kind, {"type": kind, **fields})


_PING = _event("ping")
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":%b,%b:%b}}\n\n'
)
