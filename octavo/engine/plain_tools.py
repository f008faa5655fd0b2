"""Owns how tools are told to a model whose chat template knows none: as text.

Called by `chat_template`. The calls are those of the format `hermes`, which the answer's parser
takes where a template has no format of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = "You can call these functions. Each line describes one of them as JSON:"
_AFTER = (
    "To call a function, write its name and arguments as JSON between tags, in this form:\n"
    '<tool_call>\n{"name": "function name", "arguments": {"parameter": "value"}}\n</tool_call>\n'
    "Several calls may follow each other. Results come back between <tool_response> and "
    "</tool_response>."
)


def with_tools(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    in_system: bool = True,
) -> list[Mapping[str, Any]]:
    """Returns the messages with a description of the tools behind the system's first words, or,
    for templates without a system, before those of the user."""
    lines = (json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = "\n".join((_BEFORE, *lines, "", _AFTER))
    found = list(messages)
    if found and found[0].get("role") == "system":
        found[0] = {**found[0], "content": f"{found[0].get('content') or ''}\n\n{text}".lstrip()}
    elif in_system:
        found.insert(0, {"role": "system", "content": text})
    else:
        place = next((n for n, one in enumerate(found) if one.get("role") == "user"), 0)
        found[place] = {**found[place], "content": f"{text}\n\n{found[place].get('content') or ''}"}
    return found


def with_calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the messages without calls and results: both are text, the latter of the user."""
    found: list[Mapping[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if found and found[-1].get("role") == "user" and "results" in found[-1]:
                text = f"{found.pop()['content']}\n{text}"
            found.append({"role": "user", "content": text, "results": True})
        elif message.get("tool_calls"):
            found.append(_spelled(message))
        else:
            found.append(message)
    return found


def _spelled(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = [str(message["content"])] if message.get("content") else []
    for call in message["tool_calls"]:
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        written = str(arguments) if isinstance(arguments, Mapping) else json.dumps(arguments)
        spelled = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}'
        parts.append(f"<tool_call>\n{spelled}\n</tool_call>")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(parts)}
