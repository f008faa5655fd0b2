"""Owns how calls look that an output is held to: a structural tag of a request's tools in a format.

Called by the faces for choices that a model must keep to; the tag is made a grammar elsewhere. The
formats of `table` say what stands around a call, their shapes what a call is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError
from octavo.tools.definitions import Tool, Tools
from octavo.tools.frames import Frame, Node, constant, either, sequence
from octavo.tools.shapes import Layout, ToolFormat


def held_tag(
    row: ToolFormat, tools: Tools, *, has_thought: bool, answer: Node | None = None
) -> dict[str, Any] | None:
    """Returns the structural tag of an output under the tools' choice, None if it is free.

    `answer` is what the output must be where it calls no tool; `has_thought`: a reasoning stands
    before the output. Free calls of tools are held where one of them is strict, or where not all
    may be called, from the marker of a call on; formats without markers cannot be held so.
    Raises RequestError if a call is required in a format that cannot be held to.
    """
    if tools.choice == "required":
        return structural_tag(row, tools, has_thought=has_thought)
    if not tools.are_called or row.layout is None or row.shape is None:
        return None if answer is None else {"format": answer}
    if answer is not None:
        calls = structural_tag(row, tools, has_thought=has_thought)["format"]
        return {"format": either(answer, calls)}
    is_held = bool(tools.named) or any(one.is_strict for one in tools.tools)
    return _triggered(row, row.layout, tools) if is_held else None


def _triggered(row: ToolFormat, layout: Layout, tools: Tools) -> dict[str, Any] | None:
    """Returns free text in which calls, once they begin, are held to the tools."""
    begin = layout.begin or layout.open
    trigger = next((text for text in (*row.begins, *row.opens) if begin.startswith(text)), "")
    if not trigger:
        return None
    tags = [_all_calls(row, layout, tools)] if layout.begin else _tags(row, tools)
    node = {
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": not tools.is_parallel,
    }
    return {"format": node}


def _all_calls(row: ToolFormat, layout: Layout, tools: Tools) -> Node:
    """Returns one tag around all calls of an output."""
    calls = _calls(row, layout, tools)
    return {"type": "tag", "begin": layout.begin, "content": calls, "end": layout.end}


def structural_tag(row: ToolFormat, tools: Tools, *, has_thought: bool) -> dict[str, Any]:
    """Returns the structural tag of an output that calls at least one of the callable tools, and
    says nothing else. `has_thought`: a reasoning stands before it.

    Raises RequestError where the format cannot be held to.
    """
    layout = row.layout
    if layout is None:
        message = (
            f"tool_choice: calls in the format {row.name} cannot be held to; leave the choice to "
            "the model"
        )
        raise RequestError(message, param="tool_choice", code="unsupported_field")
    before = layout.behind_thought if has_thought else ""
    return {"format": sequence(constant(before), _all_calls(row, layout, tools))}


def _calls(row: ToolFormat, layout: Layout, tools: Tools) -> Node:
    # Who names a tool means one call of it; a small model would repeat it until it is cut off.
    is_one = tools.choice == "required" and len(tools.named) == 1
    return {
        "type": "tags_with_separator",
        "tags": _tags(row, tools),
        "separator": layout.joint,
        "at_least_one": True,
        "stop_after_first": is_one or not tools.is_parallel or layout.is_single,
    }


def _tags(row: ToolFormat, tools: Tools) -> list[Node]:
    """Returns a tag for each tool that may be called; where the choice is the model's, arguments
    of tools that are not strict are any object."""
    shape = row.shape or row.written_shape
    assert row.layout is not None, "rows with a layout are held to"
    assert shape is not None, "rows with a layout have a shape"
    is_free = tools.choice == "auto"
    return [
        _tag(row.layout, shape.frame(one.name, _schema(one, is_free and not one.is_strict)))
        for one in tools.callable_tools
    ]


def _tag(layout: Layout, frame: Frame) -> Node:
    return {
        "type": "tag",
        "begin": layout.open + frame.begin,
        "content": frame.content,
        "end": frame.end + layout.close,
    }


def _schema(tool: Tool, is_any: bool) -> Mapping[str, Any]:
    if is_any:
        known = {name: {} for name in tool.parameters.get("properties", ())}
        return {"type": "object", "properties": known, "additionalProperties": True}
    return tool.parameters if "type" in tool.parameters else {"type": "object", **tool.parameters}
