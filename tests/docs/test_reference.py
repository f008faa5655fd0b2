"""The pages name what the code has: every route, field, error code and option of a server."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import octavo
from docs.make_reference import (
    MODELS,
    PAGES,
    ROOT,
    all_routes,
    fields_table,
    names_of,
    render,
    value_of,
)
from octavo.config import ServerConfig

HTTP = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
APIS = HTTP + "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("messages.md", "responses.md", "embeddings.md")
)
OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_of_the_code_is_up_to_date(name: str):
    path = ROOT / "docs" / name
    assert render()[path] == path.read_text(encoding="utf-8"), f"run `make docs`: {name} is old"


def test_every_route_is_in_http_md():
    assert len(all_routes()) > 8
    for route in all_routes():
        assert re.search(rf"`[A-Z ]+ {re.escape(route.path.replace(':path', ''))}`", HTTP)


@pytest.mark.parametrize("body", MODELS)
def test_every_field_of_a_body_has_a_row_in_a_page(body: str):
    rows = set(re.findall(r"^\| `(\w+)`", APIS, re.MULTILINE))
    for model in MODELS[body]:
        assert names_of(model) <= rows
        for name in {*model.ignored_fields, *model.refused_fields}:
            assert f"`{name}`" in APIS, name


def test_every_error_code_is_in_http_md():
    codes: set[str] = set()
    for path in [ROOT / "octavo" / "errors.py", *ROOT.glob("octavo/**/*.py")]:
        codes |= set(re.findall(r'\bcode="(\w+)"', path.read_text(encoding="utf-8")))
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in HTTP} == set()


def test_error_codes_have_in_http_md_the_status_that_the_code_gives_them():
    raised = re.compile(r'ApiError\(\s*(\d{3}),[^()]*(?:\([^()]*\)[^()]*)*?code="(\w+)"')
    found = {
        pair
        for path in ROOT.glob("octavo/server/**/*.py")
        for pair in raised.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    for status, code in found:
        assert re.search(rf"^\| {status} \|[^|]*`{code}`", HTTP, re.MULTILINE), (status, code)


def test_every_option_of_the_server_is_in_operating_md():
    for field in dataclasses.fields(ServerConfig):
        assert f"--{field.name.replace('_', '-')}" in OPERATING, field.name


def test_every_public_name_is_in_python_md():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in octavo.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_a_block_with_a_field_that_no_body_has_is_refused():
    with pytest.raises(ValueError, match="no body of chat has a field 'speed'"):
        fields_table(["chat:", "n", "speed"])


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "minimum": 1, "maximum": 64}, "1..64"),
        ({"type": "number", "minimum": 0.0, "maximum": 2.0}, "0..2"),
        ({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "0..2^31-1"),
        (
            {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}],
                "additionalProperties": {"type": "number", "minimum": -1.0, "maximum": 1.0},
            },
            "object: token id to -1..1",
        ),
        (
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "string or list of strings",
        ),
        ({"enum": ["a", "b"]}, '`"a"`, `"b"`'),
    ],
)
def test_values_are_said_in_words(field: dict[str, Any], words: str):
    assert value_of(field) == words
