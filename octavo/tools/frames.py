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
    given = dict(schema) if isinstance(schema, Mapping) else schema
    if isinstance(given, dict):
        given |= {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {"type": "json_schema", "json_schema": given}


def parameters_of(schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the names of parameters that are required, and of all others."""
    names = [*schema.get("properties", {})]
    required = [name for name in names if name in schema.get("required", ())]
    return required, [name for name in names if name not in required]
