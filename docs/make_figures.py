"""Writes the tables of figures into docs/performance.md, docs/kernels.md and README.md.

Run by `make docs`, checked by a test. Every figure is one JSON line of docs/figures/*.jsonl, in
the order of the file names; it never rounds, adds or leaves out a number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from docs.blocks import filled
from docs.blocks import table as table_of

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
COMMITS_KNOWN_SINCE = date(2026, 11, 27)
"""Older figures may lack their commit; newer ones may not."""

Number = int | float | list[int | float] | None
"""One number, [lowest, highest], or none."""


class FigureError(ValueError):
    """A line of docs/figures is not what this file says. Names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The first line of a file: where its figures are shown."""

    title: str
    page: str
    """performance or kernels."""
    text: str = ""
    """Sentences above the table: what a reader must know to read it."""
    peer: str = ""
    """Name of what `peer` is of."""
    layout: str = "rows"
    """rows: a row a figure; grid: a row a `figure`, a column a `model`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure: every line after a file's first."""

    figure: str
    """What is measured, as the row says it."""
    unit: str
    ours: Number
    date: str
    device: str
    versions: str
    command: str
    """What repeats it."""
    commit: str | None
    """Of the code that was measured; None: not recorded (older figures alone)."""
    model: str = ""
    workload: str = ""
    """Name in docs/benchmarks.md."""
    peer: Number = None
    floor: Number = None
    goal: Number = None
    before: Number = None
    ratio: float | None = None
    """Ours over the peer's (or the other way round for times), as it was measured."""
    runs: Sequence[int | float] = ()
    """The repeats that `ours` is of, if they are worth showing."""
    qualifier: str = ""
    """Words that belong to the number wherever it is shown."""
    note: str = ""
    """What holds it back, or how it is meant, in a sentence."""
    readme: str = ""
    """The row of README.md that shows it; empty: none does."""


def read(path: Path) -> tuple[Table, tuple[Figure, ...]]:
    """Returns a file's table and figures. Raises FigureError."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    table = _made(Table, lines[0] if lines else "{}", f"{path.name}:1")
    if table.page not in ("performance", "kernels") or table.layout not in ("rows", "grid"):
        raise FigureError(f"{path.name}:1: page or layout is not one that make_figures.py knows")
    figures = tuple(
        _checked(_made(Figure, line, f"{path.name}:{number}"), f"{path.name}:{number}")
        for number, line in enumerate(lines[1:], 2)
    )
    return table, figures


def _made(kind: type[Any], line: str, where: str) -> Any:
    try:
        given = json.loads(line)
        return kind(**given)
    except (ValueError, TypeError) as error:
        known = ", ".join(field.name for field in fields(kind))
        raise FigureError(f"{where}: {error}; the keys are {known}") from error


def _checked(one: Figure, where: str) -> Figure:
    if one.commit is None and date.fromisoformat(one.date) >= COMMITS_KNOWN_SINCE:
        raise FigureError(f"{where}: a figure of {one.date} names the commit it measured")
    if not (one.figure and one.unit and one.device and one.versions and one.command):
        raise FigureError(f"{where}: figure, unit, device, versions and command may not be empty")
    for name in ("ours", "peer", "floor", "goal", "before"):
        value = getattr(one, name)
        parts = value if isinstance(value, list) else [value]
        if len(parts) not in (1, 2) or any(isinstance(part, (bool, str)) for part in parts):
            raise FigureError(f"{where}: {name} is a number or [lowest, highest], got {value!r}")
    if one.ours is None:
        raise FigureError(f"{where}: ours is missing")
    return one


def shown(value: Number) -> str:
    """Returns 1,234.5, or "1 to 2" of a range, or nothing."""
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{value[0]:,} to {value[1]:,}"
    return f"{value:,}"


def _ours(one: Figure) -> str:
    runs = f" ({' and '.join(f'{run:,}' for run in one.runs)})" if one.runs else ""
    return shown(one.ours) + (f", {one.qualifier}" if one.qualifier else "") + runs


def as_rows(table: Table, figures: Sequence[Figure]) -> str:
    """Returns a table with a row a figure; a column that nobody fills is left out."""
    columns = {
        "workload": [one.workload for one in figures],
        "figure": [one.figure for one in figures],
        "model": [one.model for one in figures],
        "unit": [one.unit for one in figures],
        "before": [shown(one.before) for one in figures],
        "Octavo": [_ours(one) for one in figures],
        table.peer or "peer": [shown(one.peer) for one in figures],
        "ratio": [f"{one.ratio}x" if one.ratio else "" for one in figures],
        "floor": [shown(one.floor) for one in figures],
        "goal": [shown(one.goal) for one in figures],
        "date, commit": [one.date + (f", {one.commit}" if one.commit else "") for one in figures],
        "remark": [one.note for one in figures],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return table_of(list(filled), zip(*filled.values(), strict=True))


def as_grid(figures: Sequence[Figure]) -> str:
    """Returns a table with a row a `figure` and a column a `model`: ours / floor (qualifier)."""
    models = list(dict.fromkeys(one.model for one in figures))
    units = {one.unit for one in figures}
    cells: dict[str, dict[str, str]] = {}
    for one in figures:
        text = shown(one.ours) + (f" {one.unit}" if len(units) > 1 else "")
        text += f" / {shown(one.floor)}" if one.floor is not None else ""
        text += f" ({one.qualifier})" if one.qualifier else ""
        cells.setdefault(one.figure, {})[one.model] = text
    rows = ([name, *(row.get(model, "") for model in models)] for name, row in cells.items())
    head = units.pop() if len(units) == 1 else "measured"
    head += " / floor" if any(one.floor is not None for one in figures) else ""
    return table_of([head, *models], rows)


def section(table: Table, figures: Sequence[Figure]) -> str:
    """Returns a table with its title, where it was measured and how to repeat it."""
    parts = [f"## {table.title}"]
    if table.text:
        parts.append(table.text)
    parts.append(as_rows(table, figures) if table.layout == "rows" else as_grid(figures))
    places = dict.fromkeys((one.device, one.versions) for one in figures)
    parts.append("\n".join(f"- On {device}; {versions}." for device, versions in places))
    if table.layout == "grid":
        dates = dict.fromkeys((one.date, one.commit) for one in figures)
        named = (f"{day} (commit {commit})" if commit else day for day, commit in dates)
        parts[-1] += f"\n- Measured {', '.join(named)}."
    commands = list(dict.fromkeys(one.command for one in figures))
    parts.append("\n".join(["Repeat:", "", "```", *commands, "```"]))
    return "\n\n".join(parts)


def readme_table(figures: Sequence[Figure]) -> str:
    """Returns README's table of one file: a row a `readme`, a column a model."""
    chosen = [one for one in figures if one.readme]
    models = list(dict.fromkeys(one.model for one in chosen))
    cells: dict[str, dict[str, str]] = {}
    for one in chosen:
        beside = f"{one.ratio}x" if one.ratio else shown(one.peer)
        text = shown(one.ours) + (f", {one.qualifier}" if one.qualifier else "")
        cells.setdefault(one.readme, {})[one.model] = text + (f" ({beside})" if beside else "")
    rows = ([name, *(row.get(model, "") for model in models)] for name, row in cells.items())
    return table_of(["", *models], rows)


PERFORMANCE = """# Performance

Made by `make docs` from `docs/figures/*.jsonl`; do not edit by hand. A figure is a line there, with
the command that repeats it. What the workloads are, and what a floor is:
[benchmarks.md](benchmarks.md). Kernels: [kernels.md](kernels.md). What was tried, and what it
brought: [experiments.md](experiments.md).
"""


def render() -> dict[Path, str]:
    """Returns the pages with their tables: path -> text."""
    files = {path.stem: read(path) for path in sorted(FIGURES.glob("*.jsonl"))}
    readme, kernels = ROOT / "README.md", ROOT / "docs" / "kernels.md"
    sections = lambda names: "\n\n".join(section(*files[name]) for name in names)
    short = lambda names: readme_table([one for name in names for one in files[name][1]])
    shown_files = [file for file in files.values() if file[1]]  # a title may wait for its figures
    user = [section(*file) for file in shown_files if file[0].page == "performance"]

    return {
        ROOT / "docs" / "performance.md": "\n".join([PERFORMANCE, "\n\n".join(user), ""]),
        kernels: filled(kernels.read_text(encoding="utf-8"), {"figures": sections}),
        readme: filled(readme.read_text(encoding="utf-8"), {"figures": short}),
    }


if __name__ == "__main__":
    pages = render()
    for path, text in pages.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is out of date: run `make docs`")
