"""A tool, its calls and answers of a model, as Anthropic's messages tell them."""

from __future__ import annotations

from typing import Any

from octavo.server.call import Call
from octavo.server.exchange import Exchange
from octavo.server.message_answers import MessageHead
from octavo.tools.answers import reading_of
from octavo.tools.definitions import read_tools
from octavo.tools.detect import answer_format

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)
ANSWER = f"<think>\nI must look.\n</think>\n\nLet me look.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}"
FORMAT = answer_format("<tool_call> <think> </think>", {})


def head_of(call_id: str, *, hides_thinking: bool = False, starts: str = "") -> MessageHead:
    tools = read_tools(
        [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    )
    call = Call(id=call_id, created=0, params=None, requests=(), exchange=Exchange("id"))  # type: ignore[arg-type]
    return MessageHead(
        call=call,
        model="fake",
        reading=reading_of(FORMAT, tools, starts),
        hides_thinking=hides_thinking,
        max_tokens=10_000,
    )


USER: list[Any] = [{"role": "user", "content": "How warm is Rome?"}]


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "max_tokens": 500, "messages": USER, **fields}


def call_block(call_id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "get_weather", "input": {"city": "Rome"}}
