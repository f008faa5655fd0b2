"""What a test has started does not outlive it, however either ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.process_tree import end_tree, end_with_parent

WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
"""Stays when it is asked, and when its parent is gone."""
PROGRAM = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(100)
"""
TEST = """
import subprocess, sys, time
from tests.deploy.process_tree import end_with_parent
command = [sys.executable, "-c", "import time; time.sleep(100)"]
print(subprocess.Popen(command, preexec_fn=end_with_parent).pid, flush=True)
time.sleep(100)
"""


def is_running(pid: int) -> bool:
    """Of one that nobody waits for: a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def started_by(program: subprocess.Popen[bytes]) -> int:
    assert program.stdout is not None
    with program.stdout as told:
        pid = int(told.readline())
    assert is_running(pid)
    return pid


def await_end(pid: int) -> None:
    end = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_in_a_session_of_its_own_ends_with_its_program() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, preexec_fn=end_with_parent
    )
    worker = started_by(program)
    end_tree(program)
    assert program.returncode is not None
    await_end(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_a_program_ends_with_tests_that_are_killed() -> None:
    tests = subprocess.Popen([sys.executable, "-c", TEST], stdout=subprocess.PIPE)
    program = started_by(tests)
    tests.kill()
    tests.wait()
    await_end(program)
