"""Processes of ours that end when we do, and the engine process among them.

Used by the client and the parent of front processes, over `engine.spawn`; `engine.parent` is the
other side. Never sends or receives a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from octavo.engine.parent import ORPHANED
from octavo.engine.spawn import ENGINE_MODULE, HeadStart
from octavo.folders import new_temporary_folder

MAX_DESCRIPTORS = 253
"""That Linux passes on in one message."""


class ChildProcess:
    """One child of an event loop; the thread of the loop is its keeper."""

    def __init__(self, module: str, process: subprocess.Popen[bytes], lifeline: int) -> None:
        """`process` is one of `start_child`, that runs `module`."""
        loop = asyncio.get_running_loop()
        self._process, self._lifeline = process, lifeline
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
    """One engine process: it imports what it needs until it is told what for. To be made in an
    event loop."""

    def __init__(self, begun: HeadStart | None = None) -> None:
        """`begun`: the process, if it runs already."""
        begun = begun or HeadStart()
        self._ours = begun.channel
        super().__init__(ENGINE_MODULE, begun.process, begun.lifeline)

    def tell(self, arguments: bytes, descriptors: Sequence[int]) -> None:
        """Sends what `told` returns in the process; once. Waits until it is read."""
        # One that has ended reads nothing, as whoever waits for it finds.
        with self._ours, contextlib.suppress(ConnectionError):
            socket.send_fds(self._ours, [b"\0"], descriptors)
            self._ours.sendall(arguments)

    async def end(self) -> None:
        """Ends it at once, if it has not ended."""
        self.kill()
        await self.wait()
        self._ours.close()


def told(descriptor: int) -> tuple[bytes, list[int]]:
    """Returns the arguments of an engine process, and descriptors of its own, as many as were
    passed on; called there. Waits for its parent; nothing comes from one that wants no engine."""
    with socket.socket(fileno=descriptor) as theirs:
        _, descriptors, _, _ = socket.recv_fds(theirs, 1, MAX_DESCRIPTORS)
        with theirs.makefile("rb") as file:
            return file.read(), descriptors


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
        """Returns where a child connects to the bound sockets; on Linux nowhere: it is passed
        `descriptors` of them (`address_of`), and the folder is removed before there is anybody who
        could be killed and leave it behind."""
        if sys.platform != "linux":
            return [self.address(name) for name in names]
        self._descriptors = [os.open(self._path / name, os.O_PATH) for name in names]
        shutil.rmtree(self._path)
        return []

    @property
    def descriptors(self) -> Sequence[int]:
        return self._descriptors

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        shutil.rmtree(self._path, ignore_errors=True)


def address_of(descriptor: int) -> str:
    """Where the process that has a descriptor of a bound socket connects to it."""
    return f"ipc:///proc/self/fd/{descriptor}"
