"""Processes that end with their parent, however and whenever it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octavo.engine.child import describe_end
from octavo.engine.parent import ORPHANED
from octavo.engine.spawn import start_child
from tests.engine.processes import await_end

ROOT = Path(__file__).parents[2]
PARENT = """
import sys, time
from octavo.engine.spawn import start_child
process, _ = start_child("tests.engine.slow_import", keeper=sys.argv[1])
print(process.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("keeper", ["thread", "process"])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.5])
def test_a_child_that_still_imports_ends_with_its_parent(keeper: str, delay: float) -> None:
    command = [sys.executable, "-c", PARENT, keeper]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(delay)
        parent.kill()
    await_end(child)


def test_a_stopped_child_ends_with_its_parent() -> None:
    command = [sys.executable, "-c", PARENT, "thread"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        ignored = f"{1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1:016x}"
        await_line(child, "SigBlk", "0" * 16)
        await_line(child, "SigIgn", ignored)
        time.sleep(0.2)  # that it has asked Linux too, nothing tells
        os.kill(child, signal.SIGSTOP)
        parent.kill()
    await_end(child)


def await_line(pid: int, name: str, wanted: str) -> None:
    """Waits until the mask of signals `name` of a process has at least the bits of `wanted`."""
    deadline = time.monotonic() + 20
    while True:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = int(next(line for line in lines if line.startswith(name)).split()[1], 16)
        if mask & int(wanted, 16) == int(wanted, 16) and (int(wanted, 16) or not mask):
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_leaves_signals_of_the_group_to_its_parent(number: signal.Signals) -> None:
    process, lifeline = start_child("tests.engine.slow_import")
    for _ in range(10):
        process.send_signal(number)
        time.sleep(0.02)
    assert process.poll() is None
    os.close(lifeline)
    assert process.wait(20) == ORPHANED


def test_the_end_of_a_process_is_told_in_words() -> None:
    assert describe_end(1) == "ended with code 1"
    assert describe_end(-9) == "ended with code -9: it was killed by SIGKILL"
    assert "lost its parent" in describe_end(ORPHANED)
