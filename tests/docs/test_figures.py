"""Figures are shown only where a JSON line says them, and the pages follow the lines."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.make_figures import (
    FIGURES,
    ROOT,
    Figure,
    FigureError,
    read,
    readme_table,
    render,
    section,
)
from octavo.cli.bench.shapes import MARKS, NAMES
from tests.docs.examples import blocks_of

LINE: dict[str, Any] = {
    "figure": "output",
    "unit": "tok/s",
    "ours": 1234.5,
    "date": "2026-11-28",
    "device": "one card",
    "versions": "torch 1",
    "command": "octavo bench",
    "commit": "abc1234",
}
HEAD = {"title": "Through the server", "page": "performance", "peer": "vLLM"}


def written(tmp_path: Path, *lines: dict[str, Any], head: dict[str, Any] = HEAD) -> Path:
    path = tmp_path / "20-server.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (head, *lines)))
    return path


def all_figures() -> list[Figure]:
    return [one for path in sorted(FIGURES.glob("*.jsonl")) for one in read(path)[1]]


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/kernels.md", "README.md"])
def test_the_pages_show_what_the_lines_say(name: str):
    made = render()[ROOT / name]
    assert made == (ROOT / name).read_text(encoding="utf-8"), f"run `make docs`: {name} is old"


@pytest.mark.parametrize("name", ["docs/kernels.md", "README.md"])
def test_a_page_has_no_table_of_measured_figures_outside_its_blocks(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    rest = re.sub(r"<!-- figures .*?<!-- end of figures -->", "", text, flags=re.DOTALL)
    rows = [line for line in rest.splitlines() if line.startswith("|")]
    rates = re.compile(r"\d (us|ms|tok/s|GB/s|TFLOP/s|GFLOP/s)\b|\d\.\d+ \|")
    assert not [row for row in rows if rates.search(row)]


def test_every_file_of_figures_is_shown_somewhere():
    pages = "\n".join(render().values())
    for path in FIGURES.glob("*.jsonl"):
        table, figures = read(path)
        assert (f"## {table.title}\n" in pages) == bool(figures)


def test_a_new_line_becomes_a_row_with_every_number_as_it_is(tmp_path: Path):
    more = {"peer": 9400, "floor": [1, 2], "runs": [1200, 1269], "note": "a remark", "goal": 0.95}
    table, figures = read(written(tmp_path, LINE | more, LINE | {"figure": "second", "ours": 7}))
    page = section(table, figures)
    assert "| output | tok/s | 1,234.5 (1,200 and 1,269) | 9,400 | 1 to 2 | 0.95 |" in page
    assert "| second | tok/s | 7 | | | |" in page
    assert "2026-11-28, abc1234" in page
    assert "On one card; torch 1." in page
    assert "\noctavo bench\n" in page


def test_the_readme_shows_the_lines_that_ask_for_it(tmp_path: Path):
    lines = [
        LINE | {"model": "A", "readme": "the row", "peer": 2},
        LINE | {"model": "B", "readme": "the row", "ratio": 2.5, "qualifier": "by card"},
        LINE | {"model": "C"},
    ]
    made = readme_table(read(written(tmp_path, *lines))[1])
    assert made.splitlines()[0] == "| | A | B |"
    assert made.splitlines()[2] == "| the row | 1,234.5 (2) | 1,234.5, by card (2.5x) |"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "20-server.jsonl:2: .*unexpected keyword argument 'speed'"),
        ({"commit": None}, "names the commit it measured"),
        ({"ours": None}, "ours is missing"),
        ({"ours": "fast"}, "ours is a number or"),
        ({"peer": [1, 2, 3]}, "peer is a number or"),
        ({"command": ""}, "may not be empty"),
    ],
)
def test_a_line_that_is_no_figure_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
):
    with pytest.raises(FigureError, match=message):
        read(written(tmp_path, LINE | change))


def test_a_line_that_lacks_something_is_refused_with_the_known_keys(tmp_path: Path):
    with pytest.raises(FigureError, match=r"missing .*'command'.*the keys are figure, unit"):
        read(written(tmp_path, {key: LINE[key] for key in LINE if key != "command"}))
    with pytest.raises(FigureError, match=r"20-server.jsonl:1"):
        read(written(tmp_path, head=HEAD | {"page": "elsewhere"}))


def test_ratios_are_those_of_their_figures():
    ratios = [one for one in all_figures() if one.ratio is not None]
    assert ratios
    for one in ratios:
        assert isinstance(one.ours, (int, float))
        assert isinstance(one.peer, (int, float))
        assert one.ratio == pytest.approx(one.ours / one.peer, rel=0.05)


def test_figures_of_mixed_lengths_name_the_order_of_the_requests():
    mixed = [one for one in all_figures() if one.workload == "T"]
    given = {one.model for one in mixed if one.figure.endswith("in the order given")}
    longest = {one.model for one in mixed if one.figure.endswith("longest first")}
    assert given == longest == {one.model for one in mixed}
    assert all(one.peer is None for one in mixed if one.figure.endswith("longest first"))


def test_workloads_are_those_that_the_bench_knows():
    assert {one.workload for one in all_figures()} <= {"", *NAMES}


def test_the_bench_holds_workloads_against_the_peer_that_the_page_shows():
    models = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B"}
    for name, model in models.items():
        shown = " ".join(
            f"{one.peer} {one.note}" for one in all_figures() if one.model == model and one.peer
        )
        for mark in MARKS[name].values():
            assert mark.peer is None or str(mark.peer) in shown


def test_the_page_that_says_how_to_add_a_figure_has_one_that_is_valid(tmp_path: Path):
    page = ROOT / "docs" / "benchmarks.md"
    (block,) = [one for one in blocks_of(page) if one.language == "json"]
    assert read(written(tmp_path, json.loads(block.text)))[1]
    keys = {field.name for field in dataclasses.fields(Figure)}
    assert {key for key in keys if f"`{key}`" not in page.read_text(encoding="utf-8")} == set()
