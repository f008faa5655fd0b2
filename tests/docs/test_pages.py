"""What the pages promise: tables with their columns, links that lead somewhere."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from docs.make_cli import commands
from octavo.cli.commands import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = commands(parser)
    return [leaf for one in inner.values() for leaf in leaves(one)] if inner else [parser]


def test_every_option_is_in_cli_md_and_says_there_whether_it_takes_a_value():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[\w-]+)[^|]* \|([^|]*)\|", text, re.MULTILINE)
    for parser in leaves(build_parser()):
        for action in parser._actions:
            if not action.option_strings or action.help == argparse.SUPPRESS:
                continue
            if action.dest == "help":
                continue
            values = {
                bool(value.strip()) for flag, value in rows if flag == action.option_strings[0]
            }
            assert values <= {action.nargs != 0}, action.option_strings
            assert values or any(f"`{flag}`" in text for flag in action.option_strings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in heads}


def test_what_the_map_calls_next_is_what_readme_calls_not_yet():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| not yet \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    missing = re.sub(r" \([^)]*\)", "", row).split(", ")
    marked = set(re.findall(r"\*\(next: ([^).]*)\)\*", text))
    assert marked
    assert marked <= set(missing)
    assert (
        text.count("next:") == len(re.findall(r"\*\(next: [\w ]+\)\*", text)) + 1
    )  # how it is said


def test_the_map_does_not_promise_what_the_options_do_not_have():
    """A word of what is next stands only where it is marked."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for paragraph in re.split(r"\n(?=\d\. |\n|\||#)", text):
        for word in ("host tier", "disk tier", "LoRA", "expert slots", "MLA"):
            if word in paragraph:
                assert "*(next: " in paragraph, paragraph


def test_the_map_names_every_package_and_only_files_that_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    octavo = ROOT / "octavo"
    for one in octavo.iterdir():
        if one.is_dir() and (one / "__init__.py").exists():
            assert f"|-- {one.name}/" in text or f"{one.name}/ " in text, one.name
            assert f"\n| {one.name}/ |" in text, one.name
        elif one.suffix == ".py" and one.name != "__init__.py":
            assert one.name in text, one.name
    names = {path.name for path in octavo.rglob("*.py")}
    for found in re.findall(r"\b([\w/]+\.py)\b", text):
        assert (octavo / found).exists() or found in names or (ROOT / found).exists(), found


def test_the_map_draws_the_arrows_that_are_checked():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert " > ".join(layers) in " ".join(text.split())
