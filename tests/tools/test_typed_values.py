"""Values that are plain text in an answer get the types that the schema says."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.tools.typed_values import property_of, types_of, value_of

INTEGER = frozenset({"integer"})
TEXT_OR_NULL = frozenset({"string", "null"})

VALUES: list[tuple[str, frozenset[str], Any]] = [
    ("12", INTEGER, 12),
    ("12.0", INTEGER, 12),
    ("12.5", INTEGER, "12.5"),
    ("twelve", INTEGER, "twelve"),
    (" true ", frozenset({"boolean"}), True),
    ("True", frozenset({"boolean"}), True),
    ("1", frozenset({"number"}), 1),
    ("null", TEXT_OR_NULL, None),
    ("None", TEXT_OR_NULL, None),
    ("word", TEXT_OR_NULL, "word"),
    ('"word"', TEXT_OR_NULL, '"word"'),
    ("5", TEXT_OR_NULL, "5"),
    ("[1, 2]", frozenset({"array"}), [1, 2]),
    ('{"a": 1}', frozenset({"object"}), {"a": 1}),
    ("{a: 1}", frozenset({"object"}), "{a: 1}"),
    ("5", frozenset(), 5),
    ("007", frozenset(), "007"),
    ("NaN", frozenset(), "NaN"),
    ("word", frozenset(), "word"),
]


@pytest.mark.parametrize(("text", "types", "value"), VALUES)
def test_a_value_is_what_the_schema_allows(text: str, types: frozenset[str], value: Any) -> None:
    found = value_of(text, types)
    assert found == value
    assert type(found) is type(value)


ROOT: dict[str, Any] = {
    "$defs": {"Count": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}, "a/b": {"enum": [1]}}
}
SCHEMAS: list[tuple[Any, set[str]]] = [
    ({"type": "string"}, {"string"}),
    ({"type": ["string", "null"]}, {"string", "null"}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
    ({"enum": ["a", "b"]}, {"string"}),
    ({"const": 1}, {"integer"}),
    ({"$ref": "#/$defs/Count"}, {"integer"}),
    ({"$ref": "#/$defs/a~1b"}, {"integer"}),
    ({"$ref": "#/$defs/Loop"}, set()),
    ({"$ref": "#/$defs/None"}, set()),
    ({"allOf": [{"$ref": "#/$defs/Count"}]}, {"integer"}),
    ({}, set()),
    (True, set()),
    ("no schema", set()),
    ({"type": 5, "enum": "x", "anyOf": {}}, set()),
]


@pytest.mark.parametrize(("schema", "types"), SCHEMAS)
def test_types_are_read_from_any_schema(schema: Any, types: set[str]) -> None:
    assert types_of(schema, ROOT) == types


def test_parameters_that_are_not_listed_have_the_schema_of_additional_ones() -> None:
    schema = {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    assert types_of(property_of(schema, "a"), schema) == {"string"}
    assert types_of(property_of(schema, "b"), schema) == {"integer"}
    assert types_of(property_of({"properties": 5}, "b"), {}) == set()
