"""Answers of all formats: what a model wrote comes back, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.tools.answer_parser import AnswerFormat, AnswerParser
from octavo.tools.detect import REASONING_PARSERS, TOOL_PARSERS, answer_format
from octavo.tools.marks import Marks
from octavo.tools.reasoning_table import REASONING_FORMATS
from octavo.tools.table import TOOL_FORMATS
from tests.tools.rendering import RENDERINGS, Answer, Call, read

FORMATS = sorted(RENDERINGS)
MARKERS = sorted({text for row in TOOL_FORMATS for text in row.texts})
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\u2028"),
    max_size=12,
)
TEXTS = st.one_of(WORDS, st.sampled_from(['"', "\\", "a\nb", "{}", "]", "</x>", "'", "1", "null"]))
SCALARS = st.one_of(
    TEXTS,
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.floats(-1e6, 1e6).map(lambda number: round(number, 3)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.dictionaries(st.sampled_from(("x", "y", "z")), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(("city", "n", "a_list", "note")), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(("f", "get_weather", "a.b")), ARGUMENTS), max_size=3)
SEEDS = st.randoms(use_true_random=False)


def schema_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            "type": "object",
            "properties": {key: schema_of(one) for key, one in value.items()},
        }
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return {"type": names[type(value)]}


def schemas_of(calls: list[Call]) -> dict[str, Any]:
    """Schemas under which all calls of a tool are right."""
    found: dict[str, Any] = {}
    for name, arguments in calls:
        properties = found.setdefault(name, {"type": "object", "properties": {}})["properties"]
        for key, value in arguments.items():
            properties[key] = schema_of(value)
    return found


def cut(text: str, random: Any) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = random.choice((1, 1, 2, 3, 5, 9, 40))
        pieces.append(text[at : at + size])
        at += size
    return pieces


def is_uniform(calls: list[Call]) -> bool:
    """Whether one schema holds for all calls: no parameter has two types."""
    seen: dict[tuple[str, str], str] = {}
    for name, arguments in calls:
        for key, value in arguments.items():
            schema = json.dumps(schema_of(value), sort_keys=True)
            if seen.setdefault((name, key), schema) != schema:
                return False
    return all(is_same_kind(value) for _, arguments in calls for value in arguments.values())


def is_same_kind(value: Any) -> bool:
    if isinstance(value, list):
        return len({json.dumps(schema_of(one), sort_keys=True) for one in value}) == 1 and all(
            map(is_same_kind, value)
        )
    return all(map(is_same_kind, value.values())) if isinstance(value, dict) else True


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20, deadline=None)
@given(calls=CALLS.filter(is_uniform), random=SEEDS)
def test_what_was_called_is_found_however_the_text_is_cut(
    name: str, calls: list[Call], random: Any
) -> None:
    row = RENDERINGS[name]
    if not row.nests:
        calls = [(tool, {k: _plain(v) for k, v in given.items()}) for tool, given in calls]
    if row.is_typed:
        calls = [(tool, {k: _stripped(v) for k, v in given.items()}) for tool, given in calls]
    text = row.write(calls) if calls else ""
    schemas = {"f": {}, "get_weather": {}, "a.b": {}} | schemas_of(calls)
    answer = read(row.parser, cut(text, random), schemas=schemas)
    assert answer.calls == calls, text
    assert answer.content == ""
    assert answer.said == read(row.parser, [text], schemas=schemas).said


def _plain(value: Any) -> Any:
    """Without what cannot be written in the format: its own quotes and brackets."""
    if isinstance(value, str):
        return "".join(c for c in value if c.isalnum() or c == " ").strip() or "x"
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _stripped(value: Any) -> Any:
    return value.replace("</x>", "x") if isinstance(value, str) else value


@pytest.mark.parametrize("name", FORMATS)
def test_every_single_cut_gives_the_whole_answer(name: str) -> None:
    row = RENDERINGS[name]
    calls: list[Call] = [("f", {"city": "Z\u00fcrich \U0001f600", "n": 3}), ("get_weather", {})]
    text = row.write(calls)
    if "bare" not in name and name != "pythonic" and name != "harmony":
        text = "I look it up. \n\n" + text
    schemas = {"get_weather": {}, "f": schemas_of(calls)["f"]}
    whole = read(row.parser, [text], schemas=schemas)
    assert whole.calls == calls
    assert whole.content in ("", "I look it up.")
    for place in range(1, len(text)):
        assert read(row.parser, [text[:place], text[place:]], schemas=schemas).said == whole.said
    assert read(row.parser, [*text], schemas=schemas).said == whole.said


FRAGMENTS = [*MARKERS, *(text[:-1] for text in MARKERS if len(text) > 1)]
COMMON = ['{"name": "f", "arguments": {"a": 1}}', '{"name": "f"', "f", "f(a=1)", "[f()", "{", "]"]
COMMON += ["<think>", "</think>", "\n", " text ", "f\n", '"f">', '"k">v', "\\", '"', "\U0001f600"]
FRAGMENTS += COMMON


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), random=SEEDS)
def test_any_text_streams_to_the_whole_answer_and_is_not_lost(
    row: Any, data: st.DataObject, random: Any
) -> None:
    own = [*row.texts, *COMMON]
    fragment = st.one_of(st.sampled_from(own), st.sampled_from(FRAGMENTS), WORDS)
    text = "".join(data.draw(st.lists(fragment, max_size=14)))
    for reasoning in ("none", "qwen3"):
        one = read(row.name, [text], schemas={"f": {}}, reasoning=reasoning)
        many = read(row.name, cut(text, random), schemas={"f": {}}, reasoning=reasoning)
        assert many.said == one.said, text
    plain = read(row.name, [text], schemas={"f": {}})
    if row.shape is not None and not row.drops and not plain.names:
        assert plain.content == text


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.name)
def test_without_tools_calls_are_content(row: Any) -> None:
    if row.shape is None or row.drops:
        return
    text = next(
        one.write([("f", {"a": 1})]) for one in RENDERINGS.values() if one.parser in _names(row)
    )
    assert read(row.name, [*text]).content == text


def _names(row: Any) -> tuple[str, ...]:
    return (row.name, *row.aliases)


BROKEN = [
    ("hermes", "<tool_call>\nI would call f\n</tool_call>"),
    ("hermes", '<tool_call>\n{"arguments": {"a": 1}}\n</tool_call>'),
    ("hermes", "<tool_call>\n{'name': 'f'}\n</tool_call>"),
    ("hermes", '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "f", '),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("deepseek_v31", "<\uff5ctool\u2581calls\u2581begin\uff5c> nothing"),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>:0 oh"),
    ("pythonic", "[f(1, 2)]"),
    ("pythonic", "[f(a=__import__('os'))]"),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", '{"answer": {"name": "f", "parameters": {}}}'),
    ("gemma4", "<|tool_call>call:f{a:}<tool_call|>"),
]


@pytest.mark.parametrize(("parser", "text"), BROKEN)
def test_what_is_no_call_is_given_as_text(parser: str, text: str) -> None:
    before = "" if parser in ("pythonic", "llama3_json") else "So: "
    answer = read(parser, [*before, *text], schemas={"f": {}})
    assert answer.names == []
    assert answer.content.removeprefix("So: ") == text


def test_a_call_behind_a_broken_one_is_found() -> None:
    text = '<tool_call>oops\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    answer = read("hermes", [*text], schemas={})
    assert answer.calls == [("f", {})]
    assert answer.content == "<tool_call>oops"


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": <b>}}\n</tool_call>after'
    answer = read("hermes", [*text], schemas={})
    assert answer.arguments == ['{"a": <b>}}\n']
    assert answer.content == "after"


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": {"a": 1}}}',
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
        '[{"name": "f", "parameters": {"a": 1}}]',
    ],
)
def test_what_small_models_get_wrong_is_understood(body: str) -> None:
    answer = read("hermes", [*f"<tool_call>{body}</tool_call>"], schemas={})
    assert answer.calls == [("f", {"a": 1})]
    assert answer.content == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        ' [{"name": "f", "arguments": {"a": 1}}]'[2:-1],
        '```json\n{"name": "f", "arguments": {"a": 1}}\n```',
        '<tools>\n{"name": "f", "arguments": {"a": 1}}\n</tools>',
        '{"name": "f", "arguments": {"a": 1}}</tool_call>',
    ],
)
def test_a_call_without_its_tags_is_one_if_the_tool_is_known(text: str) -> None:
    answer = read("hermes", [*f"{text}\n{text}"], schemas={"f": {}})
    assert answer.calls == [("f", {"a": 1})] * 2
    assert answer.content == ""
    assert read("hermes", [*text], schemas={"g": {}}).content == text


def test_json_that_is_no_call_is_text_at_once() -> None:
    parser = AnswerParser(answer_format("", {}, tool_parser="hermes"), schemas={"f": {}})
    told = [piece for char in '{"answer": 42' for piece in parser.push(char)]
    assert told
    parser = AnswerParser(answer_format("", {}, tool_parser="hermes"), schemas={"f": {}})
    assert Answer.of([*parser.push("```python\nx = 1"), *parser.finish()]).content == (
        "```python\nx = 1"
    )


def test_an_answer_that_was_cut_off_has_the_arguments_so_far() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    assert read("hermes", [*text], schemas={}, is_cut=True).arguments == ['{"a": "b']
    text = "<tool_call>\n<function=f>\n<parameter=a>\nlong te"
    schemas = {"f": {"properties": {"a": {"type": "string"}}}}
    assert read("qwen3_xml", [*text], schemas=schemas, is_cut=True).arguments == ['{"a": "long te']
    assert read("qwen3_xml", [*text], schemas=schemas).arguments == ['{"a": "long te"}']


def test_long_arguments_stream_as_they_come() -> None:
    found = answer_format("", {}, tool_parser="qwen3_xml")
    schema = {"properties": {"text": {"type": "string"}}}
    parser = AnswerParser(found, schemas={"write": schema})
    parser.push("<tool_call>\n<function=write>\n<parameter=text>\n")
    assert [len(parser.push("word ")) for _ in range(50)] == [1] * 50


THOUGHTS = [
    ("<think>\nhm\n</think>\n\nYes", False, "hm", "Yes"),
    ("hm</think>Yes", True, "hm", "Yes"),
    ("Yes <think> no", False, "", "Yes <think> no"),
    ("\n Yes\n", False, "", "\n Yes\n"),
    ("hm", True, "hm", ""),
    ("<think>hm", False, "hm", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_told_from_content(
    text: str, inside: bool, reasoning: str, content: str
) -> None:
    for pieces in ([text], [*text]):
        answer = read("none", pieces, reasoning="qwen3", starts_inside=inside)
        assert (answer.reasoning, answer.content) == (reasoning, content)


def test_a_call_within_the_reasoning_is_a_call() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>I call {call} and wait</think>\nDone {call}"
    answer = read("hermes", [*text], schemas={}, reasoning="qwen3")
    assert answer.calls == [("f", {})] * 2
    assert answer.reasoning == "I calland wait"
    assert answer.content == "Done"


def test_a_marker_in_the_reasoning_that_is_no_call_stays_there() -> None:
    text = "<think>the tag <tool_call> begins it</think>Yes"
    answer = read("hermes", [*text], schemas={}, reasoning="qwen3")
    assert (answer.reasoning, answer.content) == ("the tag <tool_call> begins it", "Yes")
    assert answer.names == []


HARMONY = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json"
    '<|message|>{"a": 1}<|call|>'
)


def test_channels_are_reasoning_content_and_calls() -> None:
    whole = read("openai", [HARMONY], schemas={})
    assert (whole.reasoning, whole.content, whole.calls) == ("hm", "I look.", [("f", {"a": 1})])
    for place in range(len(HARMONY)):
        assert read("openai", [HARMONY[:place], HARMONY[place:]], schemas={}).said == whole.said
    without = read("openai", [*HARMONY])
    assert without.content == 'I look.{"a": 1}'


@pytest.mark.parametrize(("parser", "pattern"), [("mistral", 9), ("kimi_k2", 0), ("hermes", 29)])
def test_ids_are_in_the_manner_of_the_format(parser: str, pattern: int) -> None:
    row = next(one for one in RENDERINGS.values() if one.parser == parser)
    ids = read(parser, [row.write([("f", {}), ("f", {})])], schemas={}).ids
    assert ids is not None
    assert len(set(ids)) == 2
    assert (
        ids == ["functions.f:0", "functions.f:1"]
        if not pattern
        else all(len(one) == pattern for one in ids)
    )


def marked_format() -> tuple[AnswerFormat, Marks]:
    found = answer_format("", {"<tool_call>": 7, "</tool_call>": 8, "<x>": 9}, tool_parser="hermes")
    return found, found.marks


def test_a_special_token_is_a_marker_and_its_spelling_is_not() -> None:
    found, marks = marked_format()
    assert sorted(marks.by_id) == [7, 8]
    call = '{"name": "f", "arguments": {"a": "</tool_call>"}}'
    spelled = AnswerParser(found, schemas={})
    text = f"<tool_call>{call}</tool_call>"
    assert Answer.of([*spelled.push(text), *spelled.finish()]).content == text
    marked = AnswerParser(found, schemas={})
    text = marks.by_id[7] + call + marks.by_id[8]
    assert Answer.of([*marked.push(text), *marked.finish()]).calls == [("f", {"a": "</tool_call>"})]


def test_a_broken_call_in_special_tokens_is_text_with_their_names() -> None:
    found, marks = marked_format()
    parser = AnswerParser(found, schemas={})
    text = marks.by_id[7] + "oops" + marks.by_id[8]
    answer = Answer.of([*parser.push(text), *parser.finish()])
    assert answer.content == "<tool_call>oops</tool_call>"


@pytest.mark.parametrize("rows", [TOOL_FORMATS, REASONING_FORMATS])
def test_names_are_of_one_row(rows: Any) -> None:
    names = [name for row in rows for name in _names(row)]
    assert len(set(names)) == len(names)
    assert len(TOOL_PARSERS) + len(REASONING_PARSERS) > 60


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.name)
def test_no_marker_of_a_format_begins_another(row: Any) -> None:
    for group in ((*row.begins, *row.opens, *row.drops), (*row.closes, *row.ends)):
        assert not [(a, b) for a in group for b in group if a != b and a.startswith(b)]


@example(depth=5000)
@given(depth=st.integers(1, 50))
@settings(max_examples=5, deadline=None)
def test_deep_arguments_need_no_stack(depth: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * depth + "]" * depth
    answer = read("hermes", [text + "}}</tool_call>"], schemas={})
    assert answer.arguments == ['{"a": ' + "[" * depth + "]" * depth + "}"]
