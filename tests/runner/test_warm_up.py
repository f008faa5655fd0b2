"""What is built before the engine says that it is ready is all that its steps want."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.triton.interpreter import triton

assert triton

MOST = {"qwen3-30b-a3b": 61, "qwen1.5-moe-a2.7b": 67}
"""Each is half a second of some core at the first start; a variant more is a decision."""


pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="knows Triton 3.6's inside"
)


def run_binaries(*arguments: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.runner.binaries", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


@pytest.mark.parametrize("shape", MOST)
def test_no_step_waits_for_a_kernel_to_be_built(shape: str) -> None:
    wanted = run_binaries(shape)
    assert 30 < len(wanted) <= MOST[shape]
    assert [line for line in wanted if not line.startswith("warm-up ")] == []


@pytest.mark.parametrize("shape", MOST)
def test_every_kernel_compiles_for_hopper(shape: str) -> None:
    """What the interpreter lets pass: branches whose values differ in shape, too much memory."""
    assert len(run_binaries(shape, "--build")) > 30
