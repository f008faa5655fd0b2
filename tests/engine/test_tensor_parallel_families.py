"""Two ranks of every family whose layers are not alike say what one rank says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.parallel import ALONE, Meeting, TorchCollectives
from tests.engine.ranks_in_step import SIZE, Output, outputs_of
from tests.models import tiny

CASES: dict[str, dict[str, Any]] = {
    "gemma2": {"vocab_size": 212},
    "gemma2-uncapped": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma3": {},
    "gemma3-capped": {"num_key_value_heads": 6, "vocab_size": 212},
    "gpt-oss": {"vocab_size": 212},
    "gpt-oss-odd": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 22,
        "attention_bias": True,
    },
    "deepseek-v2": {"vocab_size": 212},
    "deepseek-v2-lite": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "deepseek-v3": {},
    "deepseek-v3-plain": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "glm4-moe-lite": {"vocab_size": 212},
    "glm4-moe-lite-dense-last": {},
    "glm4-moe": {"vocab_size": 212},
    "glm4-moe-odd": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 22,
    },
    "llama4": {"vocab_size": 212},
    "llama4-two-experts": {},
}
"""Changes to the tiny models: what two ranks can share; an even vocabulary is shared too."""


Found = dict[str, tuple[list[Output], int]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    found: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        for case, changes in CASES.items():
            patch.setitem(tiny.CASES, case, {**tiny.CASES[case], **changes})
            found[case] = tiny.save_tiny(case, tmp_path_factory.mktemp(case)).folder
    return found


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> Iterator[Found]:
    meeting = Meeting("127.0.0.1", SIZE)
    command = [sys.executable, "-m", "tests.engine.ranks_in_step", meeting.address]
    other = subprocess.Popen([*command, *map(str, folders.values())])
    try:
        collectives = TorchCollectives(meeting, 0, torch.device("cpu"))
        yield {case: outputs_of(folder, collectives) for case, folder in folders.items()}
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_say_what_one_says(case: str, folders: dict[str, Path], pairs: Found) -> None:
    (two, two_cached), (one, one_cached) = pairs[case], outputs_of(folders[case], ALONE)
    assert [output.token_ids for output in two] == [output.token_ids for output in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert two_cached == one_cached == 32
