"""Starts a process of ours that ends when we do; `engine.parent` is its other side.

Called by `child`, by whoever starts ranks or fronts, and by the command line before it has read the
options of `octavo serve`: imports next to nothing, no asyncio.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from octavo.engine.parent import SIGNALS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

ENGINE_MODULE = "octavo.engine.process"


def start_child(
    module: str,
    *arguments: str,
    descriptors: Sequence[int] = (),
    keeper: Literal["thread", "process"] = "process",
) -> tuple[subprocess.Popen[bytes], int]:
    """Starts `main(*arguments)` of a module in a process that inherits the descriptors.

    Returns the process and its lifeline, to be closed when the process may end. With "thread" it
    ends at the latest with the calling thread.
    """
    theirs, ours = os.pipe()
    command = [sys.executable, "-m", "octavo.engine.parent", str(theirs), keeper, module]
    try:
        with _signals_blocked():
            process = subprocess.Popen(
                [*command, *arguments],
                pass_fds=(theirs, *descriptors),
                stdin=subprocess.DEVNULL,
            )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return process, ours


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A child inherits what is blocked: Ctrl-C cannot reach it before it ignores Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class HeadStart:
    """An engine process that begins to import before anybody knows what for, with the calling
    thread as its keeper. Either `child.EngineProcess` takes it over, or `end` is called."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        """What the process is told through."""
        with theirs:
            descriptor = theirs.fileno()
            self.process, self.lifeline = start_child(
                *(ENGINE_MODULE, str(descriptor)), descriptors=(descriptor,), keeper="thread"
            )

    def end(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()
        os.close(self.lifeline)
        self.channel.close()
