"""JSON held to a schema: nothing invalid comes, everything valid can."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.constraint import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.grammar import Checker, Matcher, Vocabulary, grammar_text
from octavo.grammar.compiler import Compiler
from tests.grammar.bytes_model import SPECIALS, draw, guide_of, make_guides

SUITE = "json-schema-test-suite@0.0.10"
REDUCED = Vocabulary.of_bytes(SPECIALS)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(lambda: REDUCED, len(REDUCED.tokens))


def spellings(value: Any) -> Iterator[str]:
    """Yields JSON texts of a value: any order of keys, whole numbers without a point."""
    if isinstance(value, dict):
        for items in itertools.islice(itertools.permutations(value.items()), 720):
            inner = [itertools.islice(spellings(one), 24) for _, one in items]
            keys = [json.dumps(key, ensure_ascii=False) for key, _ in items]
            for texts in itertools.product(*inner):
                yield "{" + ", ".join(f"{k}: {t}" for k, t in zip(keys, texts, strict=True)) + "}"
    elif isinstance(value, list):
        inner = [itertools.islice(spellings(one), 24) for one in value]
        yield from ("[" + ", ".join(texts) + "]" for texts in itertools.product(*inner))
    else:
        if isinstance(value, float) and value.is_integer():
            yield str(int(value))
        yield json.dumps(value, ensure_ascii=False)


def is_accepted(matcher: Matcher, text: str) -> bool:
    ids = REDUCED.encode(text)
    if matcher.accepts(ids) < len(ids):
        return False
    at_end = matcher.copy()
    at_end.advance(ids)
    return at_end.can_end


def accepts(matcher: Matcher, value: Any) -> bool:
    return any(is_accepted(matcher, one) for one in itertools.islice(spellings(value), 3000))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases of the public test suite of JSON schema, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not there to fetch the test suite of JSON schema")
    folder = tmp_path_factory.mktemp("suite")
    command = [npm, "pack", "--silent", SUITE]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        pytest.skip(f"npm could not fetch {SUITE}: {done.stderr.decode()[-200:]}")
    shutil.unpack_archive(archives[0], folder, filter="data")
    return folder / "package" / "tests" / "draft4"


def test_the_public_suite_is_held_to_exactly(suite: Path, compiler: Compiler) -> None:
    refused: Counter[str] = Counter()
    wrong: list[tuple[str, str, str]] = []
    num_valid = num_invalid = 0
    for path in sorted(suite.glob("*.json")):
        for case in json.loads(path.read_text()):
            try:
                matcher = compiler.compile(
                    grammar_text(StructuredOutputsParams(json=case["schema"]))
                )
            except RequestError as error:
                refused[str(error)] += 1
                continue
            for one in case["tests"]:
                num_valid += one["valid"]
                num_invalid += not one["valid"]
                if accepts(matcher, one["data"]) != one["valid"]:
                    wrong.append((path.name, case["description"], one["description"]))
    assert not wrong
    assert num_valid > 80
    assert num_invalid > 90
    assert sum(refused.values()) < 25, refused


NAMES = st.sampled_from(["a", "b", "name", "\u00e9", 'q"', "x y"])
SCALARS = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 100_000),
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-50, 50)),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.sampled_from(["^[a-c]+$", "x{2,3}", "^(?:ab|cd)*$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3), st.none()), min_size=1).map(
        lambda values: {"enum": values}
    ),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda properties, num_required, extra: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:num_required],
            **({} if extra is None else {"additionalProperties": extra}),
        },
        st.dictionaries(NAMES, inner, max_size=4),
        st.integers(0, 4),
        st.one_of(st.none(), st.just(False), inner),
    )


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, low, span: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + span,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 3),
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_what_a_random_model_ends_is_valid_and_what_is_cut_can_go_on(
    schema: dict[str, Any], seed: int
) -> None:
    guides = make_guides()
    try:
        output = draw(guides, guide_of(guides, StructuredOutputsParams(json=schema)), seed)
        again = guide_of(guides, StructuredOutputsParams(json=schema))
        again.matcher.advance(output.token_ids)
        assert not again.matcher.error
    finally:
        guides.close()
    assert output.end in ("eos", "over", "cut"), output
    if output.end != "cut":
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        assert validator.is_valid(json.loads(output.text)), output.text


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["date", "time", "date-time", "uuid"]))
def test_formats_are_what_their_readers_take(seed: int, kind: str) -> None:
    schema = {"type": "string", "format": kind}
    guides = make_guides()
    try:
        output = draw(guides, guide_of(guides, StructuredOutputsParams(json=schema)), seed)
    finally:
        guides.close()
    assert output.end == "over"
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    assert validator.is_valid(json.loads(output.text)), output.text


@pytest.mark.parametrize(("format", "rest"), [("date", ""), ("date-time", "T00:00:00Z")])
def test_every_day_that_there_is_can_be_written_and_no_other(
    format: str, rest: str, compiler: Compiler
) -> None:
    schema = {"type": "string", "format": format}
    matcher = compiler.compile(grammar_text(StructuredOutputsParams(json=schema)))
    is_there = jsonschema_rs.validator_for({"format": "date"}, validate_formats=True).is_valid
    days = [f"{year}-02-{day}" for year in (1683, 1900, 2000, 2023, 2024) for day in (28, 29, 30)]
    days += [f"2023-{month:02}-{day}" for month in range(14) for day in (30, 31, 32)]
    for day in (*days, "2023-01-00", "0000-01-01", "2023-12-09", "2023-10-10", "2023-1-01"):
        assert is_accepted(matcher, f'"{day}{rest}"') == is_there(day), day


def test_white_space_is_as_asked(compiler: Compiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    texts = ('{"a":[1,2]}', '{"a": [1, 2]}', '{ "a" : [ 1 , 2 ] }')

    def accepted(**options: Any) -> list[bool]:
        wanted = StructuredOutputsParams(json=schema, **options)
        matcher = compiler.compile(grammar_text(wanted))
        return [is_accepted(matcher, text) for text in texts]

    assert accepted() == [True, True, False]
    assert accepted(disable_any_whitespace=True) == [True, False, False]
    assert accepted(whitespace_pattern="[ ]?") == [True, True, True]


def test_a_schema_cannot_loosen_the_reader(compiler: Compiler) -> None:
    schema = {"uniqueItems": True, "type": "array", "x-guidance": {"lenient": True}}
    with pytest.raises(RequestError, match="uniqueItems"):
        compiler.compile(grammar_text(StructuredOutputsParams(json=schema)))


def test_a_format_that_nobody_checks_is_a_note(compiler: Compiler) -> None:
    wanted = StructuredOutputsParams(json={"type": "string", "format": "password"})
    assert is_accepted(compiler.compile(grammar_text(wanted)), '"any"')


def test_objects_are_closed_where_asked(compiler: Compiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object"}}}
    wanted = StructuredOutputsParams(json=schema, disable_additional_properties=True)
    matcher = compiler.compile(grammar_text(wanted))
    assert is_accepted(matcher, '{"a": {}}')
    assert not is_accepted(matcher, '{"a": {"b": 1}}')
    assert not is_accepted(matcher, '{"b": 1}')


TAGGED = {
    "$defs": {
        "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
        "Dog": {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
    },
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    "discriminator": {"propertyName": "kind"},
}


def test_a_tagged_union_as_pydantic_writes_it(compiler: Compiler) -> None:
    matcher = compiler.compile(grammar_text(StructuredOutputsParams(json=TAGGED)))
    assert is_accepted(matcher, '{"kind": "dog"}')
    assert not is_accepted(matcher, '{"kind": "cow"}')


SELF = {"type": "object", "properties": {"next": {"$ref": "#"}}}
REFUSED: list[tuple[Any, str]] = [
    ({"$ref": "#"}, "no finite instance"),
    ({**SELF, "required": ["next"]}, "no finite instance"),
    ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no finite instance"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "no finite"),
    ({"type": "nothing"}, "Invalid type: nothing"),
    ({"$ref": "#/nowhere"}, "nowhere"),
    ({"$ref": "https://example.com/schema.json"}, "example.com"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
    ({"type": "string", "format": "json-pointer"}, "json-pointer"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "array", "minItems": 10**9}, "minItems 1000000000; 0 to 100000"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than"),
    ({"properties": {"a": 3}}, "#/properties/a must be an object"),
    (False, "false"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_a_schema_that_cannot_be_had_is_refused_with_the_reason(place: int) -> None:
    schema, reason = REFUSED[place]
    checker = Checker(SPECIALS)
    with pytest.raises(RequestError, match=reason) as raised:
        checker.check(grammar_text(StructuredOutputsParams(json=schema)))
    assert raised.value.param in ("structured_outputs", "structured_outputs.json")


def test_recursion_that_can_end_is_taken(compiler: Compiler) -> None:
    matcher = compiler.compile(grammar_text(StructuredOutputsParams(json=SELF)))
    assert is_accepted(matcher, '{"next": {"next": {}}}')
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert is_accepted(
        compiler.compile(grammar_text(StructuredOutputsParams(json=tree))), "[[], [[]]]"
    )


def test_definitions_may_refer_to_each_other_in_long_chains() -> None:
    definitions: dict[str, Any] = {
        f"d{i}": {
            "type": "object",
            "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}},
            "required": ["a"],
        }
        for i in range(2000)
    }
    checker = Checker({})
    whole = {"$defs": {**definitions, "d2000": {"type": "null"}}, "$ref": "#/$defs/d0"}
    assert checker.grammar(StructuredOutputsParams(json=whole))
    endless = {"$defs": {**definitions, "d2000": {"$ref": "#/$defs/d0"}}, "$ref": "#/$defs/d0"}
    with pytest.raises(RequestError, match="no finite instance"):
        checker.grammar(StructuredOutputsParams(json=endless))


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="deeper than 64"):
        grammar_text(StructuredOutputsParams(json=schema))
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested too deep"):
        StructuredOutputsParams(json=schema)


def test_another_vocabulary_without_special_tokens_will_do() -> None:
    Checker({}).grammar(StructuredOutputsParams(json_object=True))
