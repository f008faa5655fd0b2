"""Outputs that are held to a format's calls are read back as calls: whatever the tag allows."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from octavo.constraint import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.tools.constrained import held_tag, structural_tag
from octavo.tools.definitions import Tools, read_tools, with_choice
from octavo.tools.table import TOOL_FORMATS
from tests.grammar.bytes_model import draw, guide_of, make_guides
from tests.tools.held_tools import HELD, TOOLS, check
from tests.tools.rendering import read


class Writer:
    """Writes an output that a structural tag allows, and the values that it has chosen."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def write(self, node: dict[str, Any]) -> str:
        return getattr(self, node["type"])(node)

    def const_string(self, node: dict[str, Any]) -> str:
        return node["value"]

    def sequence(self, node: dict[str, Any]) -> str:
        return "".join(map(self.write, node["elements"]))

    def regex(self, node: dict[str, Any]) -> str:
        return str(self.rng.randrange(10)) if node["pattern"] == "[0-9]" else "key"

    def any_text(self, node: dict[str, Any]) -> str:
        return self.rng.choice(("Rome", 'say "hi"', "a\nb", "\u00fc \U0001f600", "<b>", ""))

    def tag(self, node: dict[str, Any]) -> str:
        return node["begin"] + self.write(node["content"]) + node["end"]

    def tags_with_separator(self, node: dict[str, Any]) -> str:
        number = 1 if node["stop_after_first"] else self.rng.randrange(node["at_least_one"], 4)
        tags = [self.write(self.rng.choice(node["tags"])) for _ in range(number)]
        return node["separator"].join(tags)

    def triggered_tags(self, node: dict[str, Any]) -> str:
        tags = [self.rng.choice(node["tags"]) for _ in range(self.rng.randrange(3))]
        assert all(tag["begin"].startswith(tuple(node["triggers"])) for tag in node["tags"])
        return "I say " + " then ".join(map(self.write, tags))

    def json_schema(self, node: dict[str, Any]) -> str:
        schema = node["json_schema"]
        return json.dumps(self.value(schema, schema))

    def value(self, schema: dict[str, Any], root: dict[str, Any]) -> Any:
        if "$ref" in schema:
            assert schema["$ref"] == "#/$defs/Place"
            return self.value(root["$defs"]["Place"], root)
        if "enum" in schema:
            return self.rng.choice(schema["enum"])
        kind = schema.get("type", "string")
        kind = self.rng.choice(kind) if isinstance(kind, list) else kind
        if kind == "object":
            return {
                name: self.value(inner, root)
                for name, inner in schema.get("properties", {}).items()
                if name in schema.get("required", ()) or self.rng.random() < 0.5
            }
        if kind == "array":
            return [self.value(schema["items"], root) for _ in range(self.rng.randrange(3))]
        choices: dict[str, list[Any]] = {
            "string": ["Oslo", 'a "b"', "c\nd", ""],
            "integer": [0, -7, 12],
            "number": [1.5, 3],
            "boolean": [True, False],
            "null": [None],
        }
        return self.rng.choice(choices[kind])


# `or` is a word of Python's.
setattr(Writer, "or", lambda self, node: self.write(self.rng.choice(node["elements"])))


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_what_a_tag_allows_is_read_as_calls(row: Any) -> None:
    tools = with_choice(read_tools(TOOLS), "required")
    tag = structural_tag(row, tools, has_thought=False)
    rng = random.Random(row.name)
    for _ in range(40):
        text = Writer(rng).write(tag["format"])
        answer = read(row.name, [text], schemas=dict(tools.schemas or {}))
        assert answer.content == "", text
        assert answer.calls
        for name, arguments in answer.calls:
            check(name, arguments)


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_a_named_tool_is_called_once_and_no_other(row: Any) -> None:
    choice = {"type": "function", "function": {"name": "mark"}}
    tools = with_choice(read_tools(TOOLS), choice)
    tag = structural_tag(row, tools, has_thought=False)
    for seed in range(5):
        text = Writer(random.Random(seed)).write(tag["format"])
        answer = read(row.name, [text], schemas=dict(tools.schemas or {}))
        assert answer.names == ["mark"]


NESTED = [row for row in TOOL_FORMATS if row.name in ("gemma4", "minimax_m3")]
DEEP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "route": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {"$ref": "#/$defs/Stop"},
        },
        "mode": {"anyOf": [{"const": "walk"}, {"enum": [1, 2]}]},
        "note": {"type": ["string", "null"]},
    },
    "required": ["route"],
    "$defs": {
        "Stop": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "at": {"type": "array"}},
            "required": ["name"],
        }
    },
}


@pytest.mark.parametrize("row", NESTED, ids=lambda row: row.name)
def test_values_that_nest_are_read_as_they_were_written(row: Any) -> None:
    given = {"type": "function", "function": {"name": "go", "parameters": DEEP}}
    tools = with_choice(read_tools([given]), "required")
    tag = structural_tag(row, tools, has_thought=False)
    rng, seen = random.Random(row.name), set[str]()
    for _ in range(60):
        answer = read(
            row.name, [Writer(rng).write(tag["format"])], schemas=dict(tools.schemas or {})
        )
        assert answer.content == ""
        for name, arguments in answer.calls:
            assert name == "go"
            assert 2 <= len(arguments["route"]) <= 3
            assert all(isinstance(stop["name"], str) for stop in arguments["route"])
            assert arguments.get("mode", "walk") in ("walk", 1, 2)
            assert isinstance(arguments.get("note"), str | None)
            seen |= arguments.keys()
    assert seen == {"route", "mode", "note"}


@pytest.mark.parametrize("row", NESTED, ids=lambda row: row.name)
def test_a_schema_without_end_is_refused_where_calls_are_no_json(row: Any) -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    given = {"type": "function", "function": {"name": "grow", "parameters": tree}}
    tools = with_choice(read_tools([given]), "required")
    with pytest.raises(RequestError, match=r"tool grow .* refers to itself"):
        structural_tag(row, tools, has_thought=False)


MARKED = [
    row for row in HELD if row.shape is not None and row.name not in ("llama3_json", "pythonic")
]


@pytest.mark.parametrize("row", MARKED, ids=lambda row: row.name)
def test_strict_tools_hold_calls_from_their_marker_on(row: Any) -> None:
    listed = json.loads(json.dumps(TOOLS))
    assert held_tag(row, read_tools(listed), has_thought=False) is None
    listed[0]["function"]["strict"] = True
    tools = read_tools(listed)
    tag = held_tag(row, tools, has_thought=False)
    assert tag is not None
    rng, seen = random.Random(row.name), 0
    for _ in range(20):
        text = Writer(rng).write(tag["format"])
        answer = read(row.name, [text], schemas=dict(tools.schemas or {}))
        assert answer.content.startswith("I say")
        for name, arguments in answer.calls:
            seen += 1
            if name == "get_weather":
                check(name, arguments)
    assert seen


@pytest.mark.parametrize("row", MARKED, ids=lambda row: row.name)
def test_a_schema_for_the_answer_leaves_calls_as_the_other_way(row: Any) -> None:
    answer = {"type": "json_schema", "json_schema": {"type": "integer"}}
    tag = held_tag(row, read_tools(TOOLS), has_thought=False, answer=answer)
    assert tag is not None
    assert tag["format"]["elements"][0] == answer
    assert held_tag(row, read_tools([]), has_thought=False, answer=answer) == {"format": answer}


@pytest.mark.parametrize("name", ["llama3_json", "pythonic"])
def test_calls_without_a_marker_are_free(name: str) -> None:
    row = next(one for one in TOOL_FORMATS if one.name == name)
    strict = json.loads(json.dumps(TOOLS[:1]))
    strict[0]["function"]["strict"] = True
    assert held_tag(row, read_tools(strict), has_thought=False) is None


def custom(name: str, form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "custom", "custom": {"name": name, "format": form}}


REGEX = {"type": "grammar", "syntax": "regex", "definition": r"[a-c]+ = \"[0-9]{2}\"|none"}
LARK = {
    "type": "grammar",
    "grammar": {"syntax": "lark", "definition": 'start: "go " "\\"" way+\nway: /[a-c]{2}|\\n/'},
}


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_the_input_of_a_custom_tool_is_of_its_pattern(row: Any) -> None:
    tools = with_choice(read_tools([custom("set", REGEX)]), "required", False)
    seen = drawn_inputs(row, tools)
    assert seen
    for text in seen:
        assert re.fullmatch(r'[a-c]+ = "[0-9]{2}"|none', text), text


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_the_input_of_a_custom_tool_is_of_its_grammar(row: Any) -> None:
    tools = with_choice(read_tools([custom("set", LARK)]), "required", False)
    seen = drawn_inputs(row, tools)
    assert seen
    for text in seen:
        assert re.fullmatch('go "(?:[a-c]{2}|\\n)+', text), repr(text)


def drawn_inputs(row: Any, tools: Tools) -> list[str]:
    """Returns the inputs of calls that a random model makes."""
    wanted = StructuredOutputsParams(structural_tag=structural_tag(row, tools, has_thought=False))
    guides, found = make_guides(), []
    try:
        for seed in range(3):
            output = draw(guides, guide_of(guides, wanted), seed, 400)
            assert output.end in ("eos", "over", "cut"), output
            if output.end != "cut":
                answer = read(row.name, [output.text], schemas=dict(tools.schemas or {}))
                assert answer.content == "", output.text
                found += [arguments["input"] for _, arguments in answer.calls]
    finally:
        guides.close()
    return found
