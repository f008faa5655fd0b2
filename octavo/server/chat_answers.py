"""What a chat's answer holds beside plain text: reasoning and calls of tools, whole or streamed.

Called by `routes.chat`, and by it alone for chats that may have them: plain ones never come here.
"""

from __future__ import annotations

from typing import Any

from octavo.engine.chat_template import RenderedChat
from octavo.outputs import OutputDelta
from octavo.server.protocol.chat import ChatRequest
from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.answers import (
    INPUTS,
    AnswerDelta,
    AnswerReader,
    AnswerReading,
    CallDelta,
    message_of,
    reading_of,
    reasoning_of,
)


def chat_reading(
    body: ChatRequest, found: AnswerFormat | None, rendered: RenderedChat
) -> AnswerReading | None:
    """Returns how the answers of a chat are read, None if they are plain text.

    Raises RequestError for tools that cannot be had.
    """
    return reading_of(
        found,
        body.tool_set(),
        rendered.text,
        tells_reasoning=body.separate_reasoning,
        shows_reasoning=body.include_reasoning,
    )


def whole_message(reader: AnswerReader, sequence: OutputDelta, echoed: str) -> dict[str, Any]:
    """Returns the message of a sequence that has ended."""
    found = reader.push(sequence.text, sequence.token_ids, sequence.finish_reason or "stop")
    return {"refusal": None, **message_of(found, echoed)}


def streamed_delta(found: AnswerDelta) -> dict[str, Any]:
    """Returns a chunk's delta, empty if nothing was added."""
    delta: dict[str, Any] = {"content": found.content} if found.content else {}
    delta |= reasoning_of(found)
    if found.calls:
        delta["tool_calls"] = [_streamed_call(call) for call in found.calls]
    return delta


def finish_reason(reader: AnswerReader, reason: str | None) -> str | None:
    """Returns why a sequence ended, as clients know it."""
    return "tool_calls" if reason == "stop" and reader.has_calls else reason


def _streamed_call(call: CallDelta) -> dict[str, Any]:
    if call.name:
        return {"index": call.number, "id": call.id, "type": call.kind, call.kind: call.function()}
    return {"index": call.number, call.kind: {INPUTS[call.kind]: call.arguments}}
