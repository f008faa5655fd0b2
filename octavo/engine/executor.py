"""The ranks of one engine: the first in this process, each other in one of its own.

Made by `engine.load` where tensor_parallel_size is above 1; the core calls it as its runner. Every
rank makes the same calls in the same order and so computes the same tokens; those of rank 0 count.
It never restarts anything: a rank that fails or dies ends the engine.

    start_ranks   processes started -> all there -> groups joined -> each loads its part -> ready
    launch        plan to every process, then to the runner here; so with masks
    collect       the same call to every process, then the runner here is waited for
    a death       seen by the watching thread, which aborts what waits for it and kills the rest
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

from octavo import errors
from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.engine.child import start_child
from octavo.errors import EngineDeadError, OctavoError
from octavo.folders import temporary_folder
from octavo.kv_cache.planner import MemoryPlan
from octavo.parallel import Collectives, TorchCollectives
from octavo.step import Runner, StepPlan, StepResult, Words
from octavo.weights.hub import ModelFiles

COLLECT, END = b"collect", b"end"
"""What a rank is sent beside pickled plans and masks."""
ARRIVED = "arrived"
"""A rank's word at start: once before it joins the groups, once when it is loaded."""
SHUTDOWN_SECONDS = 10.0


class RankArguments(NamedTuple):
    """What a rank process is sent first."""

    config: EngineConfig
    files: ModelFiles
    rank: int
    folder: Path
    """Where the ranks find each other."""
    device_index: int
    """Of the GPUs that its process sees."""


class RankFailure(NamedTuple):
    """The last word of a rank process. `kind` is the name of an OctavoError, or empty."""

    kind: str
    message: str


Loader = Callable[[Collectives], tuple[Runner, MemoryPlan]]


def start_ranks(
    config: EngineConfig, files: ModelFiles, load: Loader, first_device: int = 0
) -> tuple[Executor, MemoryPlan]:
    """Starts all ranks, loads this process's with `load`; returns when all can take plans.

    Raises the OctavoError of whichever rank cannot, or EngineDeadError.
    """
    executor = Executor(config, files, first_device)
    try:
        return executor, executor.load(load)
    except BaseException:
        executor.close()
        raise


class Executor:
    """A Runner over all ranks. Any failure of a rank raises EngineDeadError from `collect`."""

    def __init__(self, config: EngineConfig, files: ModelFiles, first_device: int) -> None:
        """Starts the processes. Raises ConfigError if there are fewer GPUs than ranks."""
        size = config.tensor_parallel_size
        select_device(config.device, first_device + size - 1)
        self._device = torch.device(select_device(config.device, first_device).torch_name)
        self._size = size
        self._folder = temporary_folder()
        self._runner: Runner | None = None
        self._collectives: Collectives | None = None
        self._error: OctavoError | None = None
        self._is_closing = False
        self._arrivals: SimpleQueue[None] = SimpleQueue()
        folder = Path(self._folder.name)
        started = [
            _start(RankArguments(config, files, rank, folder, first_device + rank))
            for rank in range(1, size)
        ]
        self._processes = [process for process, *_ in started]
        self._lifelines = [lifeline for _, lifeline, _ in started]
        self._connections = [connection for *_, connection in started]
        self._watcher = Thread(target=self._watch, name="octavo-ranks", daemon=True)
        self._watcher.start()

    def load(self, load: Loader) -> MemoryPlan:
        """Joins the ranks and loads rank 0's part; returns when every rank has loaded."""
        try:
            self._await_arrivals()
            folder = Path(self._folder.name)
            self._collectives = TorchCollectives(folder, 0, self._size, self._device)
            self._runner, plan = load(self._collectives)
            self._await_arrivals()
        except OctavoError:
            raise
        except Exception as error:
            raise self._reason(error) from error
        return plan

    def launch(self, plan: StepPlan) -> object:
        """Enqueues the step on all ranks; what fails, `collect` raises."""
        assert self._runner is not None
        self._send(pickle.dumps(plan, pickle.HIGHEST_PROTOCOL))
        return self._runner.launch(plan)

    def sample(self, ticket: object, masks: Words) -> None:
        """The same rows with the same masks on all ranks."""
        assert self._runner is not None
        self._send(pickle.dumps(masks, pickle.HIGHEST_PROTOCOL))
        self._runner.sample(ticket, masks)

    def collect(self, ticket: object) -> StepResult:
        assert self._runner is not None
        self._send(COLLECT)
        try:
            result = self._runner.collect(ticket)
        except Exception as error:
            # Whether the others failed at the same point is not known: they may be out of step.
            raise self._reason(error) from error
        if self._error is not None:
            raise self._error
        return result

    def close(self) -> None:
        """Ends all ranks, by force after SHUTDOWN_SECONDS. May be called twice."""
        if self._is_closing:
            return
        self._is_closing = True
        self._send(END)
        if self._runner is None or self._error is not None:
            self._kill()
        if self._runner is not None:
            self._runner.close()
            self._runner = None  # with its graphs, for which NCCL waits
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_SECONDS)
        self._kill()
        self._watcher.join()
        for connection, lifeline in zip(self._connections, self._lifelines, strict=True):
            connection.close()
            os.close(lifeline)
        if self._collectives is not None:
            self._collectives.abort()
        self._folder.cleanup()

    def _send(self, data: bytes) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it is gone, which the watcher sees too
                connection.send_bytes(data)

    def _await_arrivals(self) -> None:
        for _ in self._processes:
            self._arrivals.get()
            if self._error is not None:
                raise self._error

    def _reason(self, error: Exception) -> OctavoError:
        """Returns why rank 0 failed: the news of another rank's end may come a little later."""
        self._watcher.join(SHUTDOWN_SECONDS / 10)
        if self._error is None:
            self._fail(EngineDeadError(f"rank 0 failed: {type(error).__name__}: {error}"))
        assert self._error is not None
        return self._error

    def _watch(self) -> None:
        """Ends with the first rank that dies, or when all have ended as they were told."""
        ranks = {connection: rank for rank, connection in enumerate(self._connections, start=1)}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    if not self._is_closing:
                        return self._fail(self._death(ranks[connection]))
                    del ranks[connection]
                    continue
                if isinstance(message, RankFailure):
                    return self._fail(_failure(ranks[connection], message))
                self._arrivals.put(None)
        return None

    def _death(self, rank: int) -> EngineDeadError:
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return EngineDeadError(f"the process of rank {rank} ended with code {process.returncode}")

    def _fail(self, error: OctavoError) -> None:
        if self._error is None:
            self._error = error
        self._kill()
        if self._collectives is not None:
            self._collectives.abort()
        for _ in self._processes:
            self._arrivals.put(None)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _start(arguments: RankArguments) -> tuple[subprocess.Popen[bytes], int, Connection]:
    """Not through multiprocessing, which would run the user's main module again."""
    ours, theirs = Pipe()
    with theirs:
        number = theirs.fileno()
        started = start_child("octavo.engine.rank", str(number), descriptors=(number,))
    ours.send(arguments)
    return *started, ours


def _failure(rank: int, failure: RankFailure) -> OctavoError:
    kind = vars(errors).get(failure.kind)
    if kind is None:
        return EngineDeadError(f"rank {rank} failed: {failure.message}")
    assert issubclass(kind, OctavoError)
    return kind(failure.message)
