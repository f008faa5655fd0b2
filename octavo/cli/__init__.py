"""The command `octavo`.

`main` is called by the console script. Imports nothing heavy, so that it is in charge of Ctrl-C
before anything else is imported; the commands are in `commands`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 for Ctrl-C."""
    with _quiet_interrupts():
        from octavo.cli.commands import parse, run

        args = parse(sys.argv[1:] if argv is None else argv)
    return run(args)


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """While the commands are imported there is nothing to end well: Ctrl-C ends the process
    without a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
