"""Gold calls of a public benchmark, through every format: written, streamed, read back."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gold_calls import fetch, gold_calls, is_writable, pieces_of
from tests.tools.rendering import RENDERINGS, Call, read

STRIDE = 12
"""One task of so many: `python -m benchmarks.gold_calls` takes all."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    try:
        wheel: Path = fetch(tmp_path_factory.mktemp("gold"))
    except (subprocess.CalledProcessError, StopIteration):
        pytest.skip("the package registry has no bfcl-eval")
    return list(gold_calls(wheel))[::STRIDE]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RENDERINGS))
def test_gold_calls_are_read_as_they_were_written(name: str, tasks: list[Any]) -> None:
    row, rng, number = RENDERINGS[name], random.Random(name), 0
    for task, calls, schemas in tasks:
        given: list[Call] = calls
        if not is_writable(row, given, schemas):
            continue
        text = row.write(given)
        answer = read(row.parser, pieces_of(text, rng), schemas=schemas)
        assert answer.calls == given, task
        assert answer.content == "", task
        number += len(given)
    assert number > 150
