"""Owns what an answer in a chat is held to because of its tools.

Called by both faces, between the reading of a chat and its request. Never compiles anything.
"""

from __future__ import annotations

import json

from msgspec import structs

from octavo.constraint import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.tools.answers import AnswerReading
from octavo.tools.constrained import held_tag
from octavo.tools.definitions import Tools
from octavo.tools.frames import Node


def held_params(
    params: SamplingParams, tools: Tools, reading: AnswerReading | None
) -> SamplingParams:
    """Returns parameters under which the answer calls tools as they are to be called.

    Raises RequestError where it cannot be held to that.
    """
    if not tools.are_called:
        return params
    row = None if reading is None else reading.format.row
    if reading is None or row is None:
        if tools.choice == "required":
            message = "tool_choice: the server knows no format of this model's calls"
            raise RequestError(message, param="tool_choice", code="unsupported_field")
        return params
    wanted = params.structured_outputs
    answer = None if wanted is None else _schema_node(wanted)
    is_free = tools.choice == "auto"
    if wanted is not None and is_free and (answer is None or row.layout is None):
        return params  # the answer is bound in a way that leaves no room for calls
    has_thought = bool(reading.thought.ends)
    tag = held_tag(row, tools, has_thought=has_thought, answer=answer if is_free else None)
    if tag is None:
        return params
    return structs.replace(params, structured_outputs=StructuredOutputsParams(structural_tag=tag))


def _schema_node(wanted: StructuredOutputsParams) -> Node | None:
    """Returns JSON of a schema as a node, None for what is no schema or has a spelling."""
    if wanted.disable_any_whitespace or wanted.disable_additional_properties:
        return None
    if wanted.whitespace_pattern is not None or wanted.kind not in ("json", "json_object"):
        return None
    schema = json.loads(wanted.json) if isinstance(wanted.json, str) else {"type": "object"}
    return {"type": "json_schema", "json_schema": schema}
