"""Programs of others that start workers of their own: begun so that they end with the tests, and
ended with all that they have started, wherever it has put itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from benchmarks.process_figures import children_of

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """For `preexec_fn`: a SIGTERM when the tests are killed, before which nobody could tell it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_tree(
    process: subprocess.Popen[bytes], known: Iterable[int] = (), patience: float = 30.0
) -> None:
    """Asks a program to end, and kills what is left after `patience` seconds: it, its workers, and
    those `known` of before.

    Not by its group: workers may lead groups and sessions of their own, as BentoML's do.
    """
    started = list(known)
    if process.poll() is None:
        with contextlib.suppress(OSError):
            started += children_of(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if process.poll() is None:
        with contextlib.suppress(OSError):
            started += children_of(process.pid)  # which came meanwhile
        process.kill()
        process.wait()
    for one in started:
        if Path(f"/proc/{one}").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
