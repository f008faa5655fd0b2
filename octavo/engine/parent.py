"""A process that ends with its parent: `python -m octavo.engine.parent LIFELINE KEEPER MODULE ...`.

Run by `engine.spawn`. Before anything heavy is imported it watches the lifeline, a pipe whose other
end only the parent holds; then it runs `main` of the module. Never returns once the parent is gone.

    signals      ignored: Ctrl-C and a supervisor's SIGTERM reach the whole group, and the parent
                 decides when this process may go. They were blocked until here.
    lifeline     at its end a thread leaves at once; it sees an end that came before it was there.
    Linux        kills this process when the thread that started it ends: that needs no Python, so
                 it works when the interpreter is held or the process is stopped.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ORPHANED = 3
"""Exit code of a process whose parent is gone."""
_PR_SET_PDEATHSIG = 1


def run(lifeline: int, keeper: str, module: str, *arguments: str) -> int:
    """Returns what the module's `main` returns. `keeper`: "thread" if the thread that started this
    process stays as long as its process, else "process"."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if keeper == "thread" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    # What is imported stays: to look through it again and again takes an eighth of the time.
    gc.disable()
    main = importlib.import_module(module).main
    gc.freeze()
    gc.enable()
    return main(*arguments)


def _watch(lifeline: int) -> None:
    """Nothing is ever written, so that all there is to read is the end."""
    os.read(lifeline, 1)
    os._exit(ORPHANED)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), *sys.argv[2:]))
