"""A tool of chats, what a model answers that calls it, and what a client makes of the stream."""

from __future__ import annotations

from typing import Any

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)


TWO = f"Let me look.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}"


def joined(chunks: list[Any]) -> tuple[str, list[dict[str, Any]], str | None]:
    """Returns what a client puts together of a stream."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or ():
            if part.index == len(calls):
                assert part.id
                assert part.type == "function"
                calls.append({"id": part.id, "name": part.function.name, "arguments": ""})
            else:
                assert part.index == len(calls) - 1
                assert part.id is None
                assert part.function.name is None
            calls[part.index]["arguments"] += part.function.arguments or ""
    return content, calls, reason
