"""The pages that compare: their options, fields and figures are those that are here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.make_cli import commands
from docs.make_reference import names_of
from octavo.cli.commands import build_parser
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest

DOCS = Path(__file__).resolve().parents[2] / "docs"
MIGRATING = (DOCS / "migrating.md").read_text(encoding="utf-8")
CHOOSING = (DOCS / "choosing.md").read_text(encoding="utf-8")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yields heads and rows."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.strip("|\n ").split(" | ")]
            for line in block.splitlines()
        )
        yield head, rows


def flags_of_serve() -> set[str]:
    parser = commands(build_parser())["serve"]
    return {flag for action in parser._actions for flag in action.option_strings}


def test_every_option_that_another_is_to_become_exists():
    known = flags_of_serve()
    seen: set[str] = set()
    for head, rows in tables(MIGRATING):
        if "Octavo" in head[-1]:
            seen |= {flag for row in rows for flag in FLAG.findall(row[-1])}
    assert len(seen) > 20
    assert seen - known == set()


def test_options_in_the_text_of_both_pages_exist():
    for text in (MIGRATING, CHOOSING):
        prose = [line for line in text.splitlines() if not line.startswith(("|", "octavo "))]
        assert set(FLAG.findall("\n".join(prose))) <= flags_of_serve()
    (rows,) = (rows for head, rows in tables(CHOOSING) if head[-1] == "because Octavo")
    told = {flag for row in rows for flag in FLAG.findall(row[-1])}
    assert told - {"--n-cpu-moe"} <= flags_of_serve()


@pytest.mark.parametrize(
    ("route", "model"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)],
    ids=["completions", "chat"],
)
def test_every_field_that_another_is_to_become_exists(
    route: str, model: type[CompletionRequest] | type[ChatRequest]
):
    (rows,) = (rows for head, rows in tables(MIGRATING) if head[-1] == f"field of `{route}`")
    fields = [re.findall(r"`([a-z_]+)(?:: [^`]*)?`", row[-1]) for row in rows]
    kinds = {"json_schema", "regex", "false"}  # values, not fields
    named = {field for found in fields for field in found} - kinds
    assert len(named) > 8
    assert named <= names_of(model)


def test_rows_say_something_on_both_sides():
    for text in (MIGRATING, CHOOSING):
        for head, rows in tables(text):
            assert all(len(row) == len(head) and all(row) for row in rows)


def test_figures_beside_vllms_are_those_of_the_page_of_figures():
    measured = (DOCS / "performance.md").read_text(encoding="utf-8")
    (rows,) = (rows for head, rows in tables(CHOOSING) if head[-2:] == ["Octavo", "vLLM"])
    assert len(rows) > 6
    for _, model, ours, theirs in rows:
        name, one, other = (re.escape(value) for value in (model, ours, theirs))
        pair = rf"^\|.*\| {name}[^|]*\| [^|]* \| {one} \| {other} \|"
        assert re.search(pair, measured, re.MULTILINE), (model, ours, theirs)
    for figure in ("15.0 | 93.8", "3.2 |", "13.1 | 13.7"):
        assert figure in measured
