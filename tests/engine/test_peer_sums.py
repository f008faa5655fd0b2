"""Two ranks that sum through each other's memory, in Triton's interpreter: their tokens are one
rank's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.parallel import ALONE, Meeting
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.peers.two_ranks import SIZE, MappedRanks
from tests.models import tiny

from tests.engine.ranks_over_peers import tokens_of  # isort: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="benchmarks/tensor_parallel.py is for GPUs"),
]


@pytest.mark.parametrize("layout", ["parts", "whole"])
def test_two_ranks_draw_the_tokens_of_one(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(tiny.CASES, "qwen3-moe", {**tiny.CASES["qwen3-moe"], "num_experts": 4})
    model = tiny.save_tiny("qwen3-moe", tmp_path / "model").folder
    meeting = Meeting("127.0.0.1", SIZE)
    command = [sys.executable, "-m", "tests.engine.ranks_over_peers", meeting.address]
    with subprocess.Popen([*command, str(tmp_path), str(model), layout]) as other:
        try:  # whoever fails to meet it must not wait for its end
            ranks = MappedRanks(meeting, 0, tmp_path)
            two = tokens_of(model, ranks, layout)
            ranks.abort()
        finally:
            other.kill()
    assert two == tokens_of(model, ALONE, layout)
