"""The words that schemas of answers are made of.

Used by `answer_schemas` and `response_schemas`.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}
BOOL: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
IDS: Schema = {"type": "array", "items": INT}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def object_of(fields: Schema, optional: Schema | None = None) -> Schema:
    """Returns the schema of an object that has all of `fields` and may have `optional` ones."""
    properties = {**fields, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": [*fields],
        "additionalProperties": False,
    }


ANY_OBJECT: Schema = {"type": "object"}
CHANCE: Schema = {"token": TEXT, "logprob": NUMBER, "bytes": list_of(INT)}
CHAT_LOGPROBS = object_of(
    {"content": list_of(object_of({**CHANCE, "top_logprobs": list_of(object_of(CHANCE))}))}
)
