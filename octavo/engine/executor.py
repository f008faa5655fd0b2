"""The ranks of one engine: the first in this process, the others in processes of their own.

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
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

from octavo import errors
from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.engine.rank_transport import LocalRanks, RankProcess, RankTransport
from octavo.errors import EngineDeadError, OctavoError
from octavo.kv_cache.planner import MemoryPlan
from octavo.parallel import Collectives, Meeting, TorchCollectives
from octavo.step import Runner, StepPlan, StepResult, Words
from octavo.weights.fingerprint import with_fingerprint
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
    address: str
    """Where the ranks find each other, as host:port."""
    device_index: int
    """Of the GPUs that its process sees."""
    fingerprint: str = ""
    """Of the weights (`weights.fingerprint`), for a rank that may be on another host: it finds the
    files there, and they must be the same."""


class RankFailure(NamedTuple):
    """The last word of a rank process. `kind` is the name of an OctavoError, or empty."""

    kind: str
    message: str


Loader = Callable[[Collectives], tuple[Runner, MemoryPlan]]


def start_ranks(
    config: EngineConfig,
    files: ModelFiles,
    load: Loader,
    first_device: int = 0,
    transport: RankTransport | None = None,
) -> tuple[Executor, MemoryPlan]:
    """Starts all ranks, loads this process's with `load`; returns when all can take plans.
    `transport` says how they are started: as processes of this host, if not given.

    Raises the OctavoError of whichever rank cannot, or EngineDeadError.
    """
    executor = Executor(config, files, first_device, transport or LocalRanks())
    try:
        return executor, executor.load(load)
    except BaseException:
        executor.close()
        raise


class Executor:
    """A Runner over all ranks. Any failure of a rank raises EngineDeadError from `collect`."""

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        first_device: int,
        transport: RankTransport,
    ) -> None:
        """Starts the ranks. Raises ConfigError if there are fewer GPUs than ranks here, and
        EngineDeadError if one does not come."""
        size = config.tensor_parallel_size
        if isinstance(transport, LocalRanks):
            select_device(config.device, first_device + size - 1)
        self._device = torch.device(select_device(config.device, first_device).torch_name)
        self._size = size
        self._runner: Runner | None = None
        self._collectives: Collectives | None = None
        self._error: OctavoError | None = None
        self._is_closing = False
        self._arrivals: SimpleQueue[None] = SimpleQueue()
        self._meeting = Meeting(transport.host, size)
        self._ranks: list[RankProcess] = []
        is_here = isinstance(transport, LocalRanks)
        fingerprint = "" if is_here else with_fingerprint(files).identity
        for rank, (process, index) in enumerate(transport.start(size, first_device), start=1):
            arguments = RankArguments(
                config, files, rank, self._meeting.address, index, fingerprint
            )
            process.connection.send(arguments)
            self._ranks.append(process)
        self._watcher = Thread(target=self._watch, name="octavo-ranks", daemon=True)
        self._watcher.start()

    def load(self, load: Loader) -> MemoryPlan:
        """Joins the ranks and loads rank 0's part; returns when every rank has loaded."""
        try:
            self._await_arrivals()
            self._collectives = TorchCollectives(self._meeting, 0, self._device)
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
        for rank in self._ranks:
            rank.wait(SHUTDOWN_SECONDS)
        self._kill()
        self._watcher.join()
        for rank in self._ranks:
            rank.close()
        if self._collectives is not None:
            self._collectives.abort()

    def _send(self, data: bytes) -> None:
        for rank in self._ranks:
            with contextlib.suppress(OSError):  # it is gone, which the watcher sees too
                rank.connection.send_bytes(data)

    def _await_arrivals(self) -> None:
        for _ in self._ranks:
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
        ranks = {one.connection: rank for rank, one in enumerate(self._ranks, start=1)}
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
        how = self._ranks[rank - 1].wait(1) or "closed its connection"
        return EngineDeadError(f"the process of rank {rank} {how}")

    def _fail(self, error: OctavoError) -> None:
        if self._error is None:
            self._error = error
        self._kill()
        if self._collectives is not None:
            self._collectives.abort()
        for _ in self._ranks:
            self._arrivals.put(None)

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


def _failure(rank: int, failure: RankFailure) -> OctavoError:
    kind = vars(errors).get(failure.kind)
    if kind is None:
        return EngineDeadError(f"rank {rank} failed: {failure.message}")
    assert issubclass(kind, OctavoError)
    return kind(failure.message)
