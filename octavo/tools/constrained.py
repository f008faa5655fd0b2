"""Owns how calls look that an output is held to: a structural tag of a request's tools in a format.

Called by the faces for choices that a model must keep to; the tag is made a grammar elsewhere. The
formats of `table` say what stands around a call, their shapes what a call is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError
from octavo.tools.definitions import Tool, Tools
from octavo.tools.frames import Frame, Node, constant, sequence
from octavo.tools.shapes import Layout, ToolFormat


def structural_tag(row: ToolFormat, tools: Tools, *, has_thought: bool) -> dict[str, Any]:
    """Returns the structural tag of an output that calls at least one of the callable tools, and
    says nothing else. `has_thought`: a reasoning stands before it.

    Raises RequestError where the format cannot be held to.
    """
    layout, shape = row.layout, row.shape or row.written_shape
    if layout is None or shape is None:
        message = (
            f"tool_choice: calls in the format {row.name} cannot be held to; leave the choice to "
            "the model"
        )
        raise RequestError(message, param="tool_choice", code="unsupported_field")
    tags = [_tag(layout, shape.frame(one.name, _schema(one))) for one in tools.callable_tools]
    calls: Node = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": layout.joint,
        "at_least_one": True,
        "stop_after_first": not tools.is_parallel or layout.is_single,
    }
    before = (layout.behind_thought if has_thought else "") + layout.begin
    return {"format": sequence(constant(before), calls, constant(layout.end))}


def _tag(layout: Layout, frame: Frame) -> Node:
    return {
        "type": "tag",
        "begin": layout.open + frame.begin,
        "content": frame.content,
        "end": frame.end + layout.close,
    }


def _schema(tool: Tool) -> Mapping[str, Any]:
    return tool.parameters if "type" in tool.parameters else {"type": "object", **tool.parameters}
