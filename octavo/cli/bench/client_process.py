"""Client processes of `octavo bench serve`: they begin together, and their results come together.

Run by `bench.serve`, and as the main module of each process. Never sends a request itself.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from octavo.cli.bench.client import ClientResult, Load, run_client
from octavo.errors import OctavoError

Done = Callable[[int], None]


def run_clients(loads: Sequence[Load], done: Done) -> tuple[list[ClientResult], float]:
    """Returns what every client saw, and when all of them began.

    One is run in this process. `done` is called with the number of requests that just ended.
    """
    if len(loads) > 1:
        with _processes(loads) as pipes:
            return _collect(pipes, done)
    start: list[float] = []

    def begin() -> float:
        start.append(time.monotonic())
        return start[0]

    return [run_client(loads[0], done, begin)], start[0]


@contextlib.contextmanager
def _processes(loads: Sequence[Load]) -> Iterator[list[Connection]]:
    """Starts a process for each load; none outlives the block."""
    processes: list[subprocess.Popen[bytes]] = []
    pipes: list[Connection] = []
    try:
        for _ in loads:
            process, pipe = _start()
            processes.append(process)
            pipes.append(pipe)
        for pipe, load in zip(pipes, loads, strict=True):
            pipe.send(load)
        yield pipes
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.wait()
            pipe.close()


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    """Not through multiprocessing, which would run the user's main module again."""
    ours, theirs = Pipe()
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, "-m", "octavo.cli.bench.client_process", str(number)]
        process = subprocess.Popen(command, pass_fds=(number,), stdin=subprocess.DEVNULL)
    return process, ours


def _collect(pipes: Sequence[Connection], done: Done) -> tuple[list[ClientResult], float]:
    """Lets all processes begin at once."""
    for pipe in pipes:
        _receive(pipe)
    start = time.monotonic()
    for pipe in pipes:
        pipe.send(start)
    results: dict[int, ClientResult] = {}
    while len(results) < len(pipes):
        for ready in wait([pipe for index, pipe in enumerate(pipes) if index not in results]):
            assert isinstance(ready, Connection)
            news = _receive(ready)
            if isinstance(news, ClientResult):
                results[pipes.index(ready)] = news
            else:
                done(news)
    return [results[index] for index in range(len(pipes))], start


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise OctavoError("a client process ended before its answers came") from error


def main(number: str) -> None:
    """A client process: says when it is ready, what ended, and at the end all that it saw."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this one
    pipe = Connection(int(number))

    def wait_for_start() -> float:
        pipe.send("ready")
        return pipe.recv()

    pipe.send(run_client(pipe.recv(), pipe.send, wait_for_start))


if __name__ == "__main__":
    main(sys.argv[1])
