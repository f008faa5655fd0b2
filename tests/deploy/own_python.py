"""A Python that has a package of others beside all that this one has."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_with(module: str, requirement: str, folder: Path, seconds: float) -> str:
    """Returns the path of a Python with `module`: this one's, or one made in `folder`. Skips the
    test where the requirement cannot be installed, with the reason."""
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "ours.pth").write_text("\n".join([str(ROOT), *ours]))
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} cannot be had: pip took longer than {seconds:g} s")
    if done.returncode:
        pytest.skip(f"{requirement} cannot be had: {done.stderr.strip()[-300:]}")
    return python
