"""Owns the nodes of structural tags that shapes of calls are made of.

Used by the shapes; `constrained` puts them together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]
LARK = "x-lark"
"""In the schema of a text: the grammar, in Lark's form, that it is held to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One call of one tool: what stands around the part that the schema governs."""

    begin: str
    content: Node
    end: str = ""


def constant(text: str) -> Node:
    return {"type": "const_string", "value": text}


def sequence(*elements: Node) -> Node:
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: Node) -> Node:
    return {"type": "or", "elements": list(elements)}


def schema_node(schema: object, root: Mapping[str, Any]) -> Node:
    """Returns JSON of a schema that may refer into `root`."""
    given = closed(schema)
    if isinstance(given, dict):
        if LARK in given:
            return _quoted_text(given[LARK])
        properties = given.get("properties")
        if isinstance(properties, Mapping) and any(LARK in one for one in properties.values()):
            ((name, one),) = properties.items()  # a custom tool has its input alone
            key = json.dumps(name, ensure_ascii=False)
            return sequence(constant(f"{{{key}: "), _quoted_text(one[LARK]), constant("}"))
        given |= {key: closed_all(root[key]) for key in _DEFINITIONS if key in root}
    return {"type": "json_schema", "json_schema": given}


def _quoted_text(lark: str) -> Node:
    """Returns a text of a grammar as JSON."""
    inner = {"type": "grammar", "grammar": lark, "is_quoted": True}
    return sequence(constant('"'), inner, constant('"'))


def text_node(schema: object, begin: str, end: str) -> Node:
    """Returns a text of a schema that is written as it is, between two others; patterns are held
    to where they are anchored as a whole."""
    content: Node = {"type": "any_text"}
    if isinstance(schema, Mapping):
        pattern = schema.get("pattern")
        whole = _WHOLE.fullmatch(pattern) if isinstance(pattern, str) else None
        if LARK in schema:
            content = {"type": "grammar", "grammar": schema[LARK]}
        elif whole is not None:
            content = {"type": "regex", "pattern": whole[1], "is_lazy": True}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


_WHOLE = re.compile(r"\^(\(\?:.*\)|(?:[^|\\]|\\.)*)\$", re.DOTALL)
"""A pattern that begins and ends a text, in all its alternatives."""


def closed(schema: object) -> object:
    """Returns a schema whose objects have the named properties alone, unless it says otherwise:
    who lists the parameters of a tool means these."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name in ("properties", *_DEFINITIONS):
        if name in found:
            found[name] = closed_all(found[name])
    if "items" in found:
        found["items"] = closed(found["items"])
    for name in ("anyOf", "oneOf"):
        if isinstance(found.get(name), list):
            found[name] = [closed(one) for one in found[name]]
    if "properties" in found and not _OPENING & found.keys():
        found["additionalProperties"] = False
    return found


def closed_all(schemas: object) -> object:
    if not isinstance(schemas, Mapping):
        return schemas
    return {name: closed(schema) for name, schema in schemas.items()}


_DEFINITIONS = ("$defs", "definitions")
_OPENING = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
"""What may give an object properties that are not listed beside it."""


def parameters_of(schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the names of parameters that are required, and of all others."""
    names = [*schema.get("properties", {})]
    required = [name for name in names if name in schema.get("required", ())]
    return required, [name for name in names if name not in required]
