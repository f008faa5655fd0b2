"""Owns the nodes of structural tags that shapes of calls are made of.

Used by the shapes; `constrained` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]


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
        given |= {key: closed_all(root[key]) for key in _DEFINITIONS if key in root}
    return {"type": "json_schema", "json_schema": given}


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
