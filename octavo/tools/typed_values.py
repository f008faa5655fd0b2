"""Owns what a value is that a model wrote as plain text: the tool's schema says its type.

Used by the grammars of formats whose arguments are no JSON. Never checks values: whoever runs the
tool does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_REFERENCES = 16
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def types_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Returns the JSON types that `schema` allows; none if it does not say.

    `root` is the schema that references begin at.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return frozenset()
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return types_of(referred(reference, root), root, depth + 1)
    given = schema.get("type")
    found = {given} if isinstance(given, str) else set()
    if isinstance(given, list):
        found = {one for one in given if isinstance(one, str)}
    if not found:
        for key in ("anyOf", "oneOf", "allOf"):
            options = schema.get(key)
            for option in options if isinstance(options, list) else ():
                found |= types_of(option, root, depth + 1)
    if not found and isinstance(options := schema.get("enum", [schema.get("const")]), list):
        found = {_type_of(option) for option in options if option is not None}
    return frozenset(found)


def property_of(schema: Mapping[str, Any], name: str) -> object:
    """Returns the schema of one parameter; an empty one if there is none."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return schema.get("additionalProperties", {})


def is_text(types: frozenset[str]) -> bool:
    """Whether values of these types are texts and nothing else, and so need not be looked at."""
    return types == {"string"}


def value_of(text: str, types: frozenset[str]) -> Any:
    """Returns the value that `text` spells: what the types allow, else the text itself."""
    stripped = text.strip()
    if stripped in _PYTHON_WORDS:
        value: Any = _PYTHON_WORDS[stripped]
    else:
        try:
            value = json.loads(stripped, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return text
    if not types:
        return text if isinstance(value, str) else value
    found = _type_of(value)
    if found in types or (found == "integer" and "number" in types):
        # A text in quotes, where texts are written without: the quotes are part of it.
        return text if found == "string" else value
    if found == "number" and "integer" in types and value == int(value):
        return int(value)
    return text


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, Sequence) else "object"


def referred(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for part in reference.removeprefix("#").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if name:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(word)
