"""Tools of many types, the formats that hold outputs to them, and what a call of one has to be."""

from __future__ import annotations

from typing import Any

from octavo.tools.table import TOOL_FORMATS

PROPERTIES: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "unit": {"enum": ["celsius", "kelvin"], "type": "string"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "place": {"$ref": "#/$defs/Place"},
    "loud": {"type": "boolean"},
}


DEFS = {"Place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}}


def tool(name: str, names: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {one: PROPERTIES[one] for one in names},
        "required": list(required),
        "$defs": DEFS,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS: list[Any] = [
    tool("get_weather", ("city", "days", "unit"), ("city", "unit")),
    tool("mark", ("tags", "place", "loud"), ("place",)),
    tool("list_all", ("days", "loud"), ()),
    {"type": "function", "function": {"name": "ping"}},
]


HELD = [row for row in TOOL_FORMATS if row.layout is not None]


KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


def check(name: str, arguments: dict[str, Any]) -> None:
    schema = next(
        one["function"].get("parameters", {}) for one in TOOLS if one["function"]["name"] == name
    )
    assert set(schema.get("required", ())) <= set(arguments)
    assert set(arguments) <= set(schema.get("properties", ()))
    for key, value in arguments.items():
        inner = schema["properties"][key]
        assert isinstance(value, KINDS.get(inner.get("type", ""), dict)), (key, value)
        assert "enum" not in inner or value in inner["enum"]
