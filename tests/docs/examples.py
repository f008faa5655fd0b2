"""The examples of a page: its fenced blocks in order, and how each is run.

Used by test_examples.py. A page may say in a comment, which readers do not see, which options the
server of the blocks after it has: `<!-- server: --api-key secret -->`.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE_URL = "http://127.0.0.1:8000"
"""As pages write it; an example is sent to the server that the test started."""
PAGE_MODEL = "demo-moe"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    server: tuple[str, ...]
    """Options of the server that it speaks to."""


def blocks_of(path: Path) -> list[Block]:
    """Returns a page's fenced blocks."""
    blocks: list[Block] = []
    server: tuple[str, ...] = ()
    opened: tuple[str, int, list[str]] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and (found := re.fullmatch(r"<!-- server: ?(.*?) ?-->", line)):
            server = tuple(found[1].split())
        elif opened is None and line.startswith("```"):
            opened = line.removeprefix("```"), number, []
        elif opened is not None and line == "```":
            blocks.append(Block(opened[0], "\n".join(opened[2]), opened[1], server))
            opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"{path.name}: the block of line {opened and opened[1]} does not end"
    return blocks


def run_shell(text: str, url: str) -> str:
    """Returns what a block of shell prints. Raises AssertionError if it fails."""
    script = text.replace(PAGE_URL, url)
    run = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shape_of(value: Any) -> Any:
    """Returns a JSON value without what differs from run to run: its keys and kinds."""
    if isinstance(value, dict):
        # Maps of tokens have other keys in every run.
        return {key: [] if key == "top_logprobs" else shape_of(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape_of(one) for one in value[:1]]
    if isinstance(value, bool) or value is None:
        return value
    return "number" if isinstance(value, int | float) else "text"


def events_of(text: str) -> list[Any]:
    """Returns the shapes of a stream's events, in the order in which each came first."""
    shapes: list[Any] = []
    for line in text.splitlines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            shape = data if data == "[DONE]" else shape_of(json.loads(data))
            if shape not in shapes:
                shapes.append(shape)
    return shapes
