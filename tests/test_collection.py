"""Every test file loads where Triton is not installed: those that need it skip themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_TRITON = """
import sys, pytest
sys.modules["triton"] = None
options = "--collect-only -q -p no:cacheprovider -p no:xdist".split()
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def collect(*paths: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_kernels_are_collected_without_triton() -> None:
    said = collect("tests/kernels")
    assert said.returncode == 0, said.stdout[-2000:]
    assert "tests/kernels/test_linear.py" in said.stdout
    assert "tests/kernels/triton/experts/test_ring.py" not in said.stdout
