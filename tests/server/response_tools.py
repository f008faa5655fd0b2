"""Tools of the Responses API, and what a model answers that calls them."""

from __future__ import annotations

from typing import Any

from octavo.tools.detect import answer_format

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}


SHELL: dict[str, Any] = {"type": "custom", "name": "shell", "description": "Runs a line."}


TOOLS: list[Any] = [WEATHER, SHELL]


CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome",  "days": 2}}\n</tool_call>'
)


RUN = '<tool_call>\n{"name": "shell", "arguments": {"input": "ls \\"a\\""}}\n</tool_call>'


ANSWER = f"<think>Which city? Rome.</think>Let me look.\n{CALL}\n{RUN}"


FORMAT = answer_format("<tool_call> </think>", {})
