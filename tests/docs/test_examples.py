"""The pages' examples run: Python, curl against a server, and the commands' options."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from anthropic import Anthropic
from openai import OpenAI

from octavo.cli.commands import build_parser
from tests.docs.conftest import ServerUrl
from tests.docs.examples import (
    PAGE_MODEL,
    PAGE_URL,
    Block,
    blocks_of,
    events_of,
    run_shell,
    shape_of,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
WITH_CURL = [
    page for page in PAGES if any("curl " in b.text for b in blocks_of(page) if b.language == "sh")
]
WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))]
named = {"ids": lambda page: page.name}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", WITH_CURL, **named)
def test_requests_of_a_page_are_answered_as_it_shows(page: Path, server_url: ServerUrl):
    blocks = blocks_of(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "sh" and "curl " in block.text:
            answer = run_shell(block.text, server_url(block.server))
            if after is not None and after.language == "json":
                where = f"{page.name}:{after.line}"
                assert shape_of(json.loads(answer)) == shape_of(json.loads(after.text)), where
            elif after is not None and after.text.startswith("data: "):
                assert events_of(answer) == events_of(after.text), f"{page.name}:{after.line}"


@pytest.mark.parametrize("page", WITH_PYTHON, **named)
def test_python_of_a_page_runs_in_its_order(page: Path, server_url: ServerUrl, tiny_folder: Path):
    names: dict[str, object] = {"__name__": "page"}
    try:
        for block in blocks_of(page):
            if block.language == "python":
                code = block.text
                if PAGE_URL in code:
                    code = code.replace(PAGE_URL, server_url(block.server))
                else:
                    code = code.replace(f'"{PAGE_MODEL}"', repr(str(tiny_folder)))
                # Lines of the page in tracebacks.
                exec(compile("\n" * block.line + code, str(page), "exec"), names)
    finally:
        for value in names.values():
            # A page leaves its client to the end of its program, whose sockets go with it.
            if isinstance(value, OpenAI | Anthropic):
                value.close()


def commands_of(block: Block) -> list[list[str]]:
    """Returns the arguments of the lines that call `octavo`."""
    text = block.text.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"(\$ )?octavo ", line)]
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, **named)
def test_commands_of_a_page_have_options_that_exist(page: Path):
    for block in blocks_of(page):
        for argv in commands_of(block):
            if "--help" not in argv:
                build_parser().parse_checked(argv)
