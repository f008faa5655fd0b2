"""From the tools of Anthropic's API to those of a chat.

Called by `protocol.messages`. A translation: what comes out is checked as every chat's tools are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError, shown
from octavo.tools.definitions import NAME_PATTERN, read_tools

_FIELDS = frozenset({"type", "name", "description", "input_schema", "strict"})
_IGNORED = frozenset(
    {"cache_control", "defer_loading", "input_examples", "eager_input_streaming", "allowed_callers"}
)
"""They say nothing to the model: all tools are told at once, by their schemas."""
_LONGEST_NAME = 64

TOOL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"anyOf": [{"const": "custom"}, {"type": "null"}]},
        "name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
        "description": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "input_schema": {
            "type": "object",
            "properties": {"type": {"const": "object"}, "properties": {"type": "object"}},
        },
        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["name", "input_schema"],
}
"""What `chat_tools` takes."""


def chat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tools of a chat. Raises RequestError naming the tool and the field."""
    found = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    try:
        read_tools(found)
    except RequestError as error:
        raise RequestError(
            _as_sent(str(error)), param=_as_sent(error.param or "tools"), code=error.code
        ) from error
    return found


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind is not None and kind != "custom":
        message = (
            f"{where}.type {shown(kind)} is not supported: the server has no tools of its own; "
            "describe the tool with name and input_schema"
        )
        raise RequestError(message, param=f"{where}.type", code="unsupported_field")
    for name in tool.keys() - _FIELDS - _IGNORED:
        place = f"{where}.{name[:_LONGEST_NAME]}"
        message = f"{place} is an unknown field; use name, description, input_schema, strict"
        raise RequestError(message, param=place, code="unknown_field")
    if not isinstance(tool.get("input_schema"), Mapping):
        place = f"{where}.input_schema"
        raise RequestError(f"{place} must be a JSON schema, an object's", param=place)
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _as_sent(text: str) -> str:
    """Returns `text` with the names that fields have in the client's body."""
    return re.sub(r"\.function(\.parameters)?", lambda m: ".input_schema" if m[1] else "", text)
