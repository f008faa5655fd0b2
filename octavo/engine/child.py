"""Processes of ours that end when we do, and the engine process among them.

Used by the client and by the executor of tensor parallel ranks; `engine.parent` is the other side.
Never sends or receives a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

from octavo.engine.parent import ORPHANED, SIGNALS
from octavo.folders import new_temporary_folder


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


ENGINE_MODULE = "octavo.engine.process"


class ChildProcess:
    """One child of an event loop; the thread of the loop is its keeper."""

    def __init__(self, module: str, *arguments: str, descriptors: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        self._process, self._lifeline = start_child(
            module, *arguments, descriptors=descriptors, keeper="thread"
        )
        self._ended: asyncio.Future[int] = loop.create_future()
        threading.Thread(target=self._wait, args=(loop,), name=module, daemon=True).start()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        os.close(self._lifeline)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(self._ended.set_result, code)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of subprocess.Popen; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Returns the exit code."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class EngineProcess(ChildProcess):
    """One engine process."""

    def __init__(self, *arguments: str, descriptors: Sequence[int]) -> None:
        super().__init__(ENGINE_MODULE, *arguments, descriptors=descriptors)


def describe_end(code: int) -> str:
    """Returns how a process ended, for people: "ended with code 1", "was killed by SIGKILL"."""
    if code >= 0:
        return f"ended with code {code}" + " (it lost its parent)" * (code == ORPHANED)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"ended with code {code}: it was killed by {name}"


class SocketFolder:
    """A folder of one user's for the sockets of one engine, gone as soon as that is possible."""

    def __init__(self) -> None:
        self._path = new_temporary_folder()
        self._descriptors: list[int] = []

    def address(self, name: str) -> str:
        """Where to bind the socket `name`."""
        return f"ipc://{self._path / name}"

    def share(self, *names: str) -> list[str]:
        """Returns where a child connects to the bound sockets; it inherits `descriptors`.

        On Linux a socket is reached through a descriptor of it: the folder is removed before there
        is anybody who could be killed and leave it behind.
        """
        if sys.platform != "linux":
            return [self.address(name) for name in names]
        self._descriptors = [os.open(self._path / name, os.O_PATH) for name in names]
        shutil.rmtree(self._path)
        return [f"ipc:///proc/self/fd/{descriptor}" for descriptor in self._descriptors]

    @property
    def descriptors(self) -> Sequence[int]:
        return self._descriptors

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        shutil.rmtree(self._path, ignore_errors=True)
