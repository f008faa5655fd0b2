"""What the ranks that share every layer tell each other: sums of tensors, the least of numbers.

Made by the engine for each rank, held by the decoder. Knows no model and keeps nothing for the
whole process, so that two engines in one process do not meet.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from octavo.config.environment import forbid_multicast
from octavo.errors import EngineDeadError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: some read the weights from a colder page cache."""
_ABORT_SECONDS = 5.0
MEETING_SECONDS = 60.0
"""How long ranks look for each other, once all are started."""


class UnreachableError(Exception):
    """Ranks cannot address each other's memory; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeerMemory:
    """Memory of every rank that this one can address."""

    buffers: tuple[Tensor, ...]
    """uint8 [N] of each rank, as seen from this one."""
    stop: Tensor
    """int32 [1] of the host, which kernels see: 0 until nobody is to wait for other ranks."""
    keeper: object = None
    """What holds the memory."""


class Collectives(Protocol):
    """One rank's way to the others. All ranks call the same methods in the same order. Whoever
    derives from it has no kernels that do more than the sum."""

    rank: int
    size: int

    @property
    def takes_parts(self) -> bool:
        """Whether `add_rms_norm` adds up parts [T, S, M] first, as `Ops.add_rms_norm` may."""
        return False

    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum over all ranks, with the same bits on each; may overwrite x, which is
        contiguous. On a GPU it is enqueued on the current stream, and a graph can capture it."""
        ...

    def add_rms_norm(
        self,
        x_TM: Tensor,
        residual_TM: Tensor,
        weight_M: Tensor,
        eps: float,
        ids_TK: Tensor | None = None,
    ) -> Tensor | None:
        """residual += the sum of x over all ranks, in place; returns its RMS norm. None, having
        done nothing, where that is no single kernel; never for parts, if it takes some. ids_TK: of
        the first K parts those that add something; negative ids add nothing."""
        return None

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """Returns every rank's x [S, N] side by side in rank order: [S, size * N], contiguous."""
        ...

    def least(self, values: Sequence[int]) -> list[int]:
        """Returns the smallest of all ranks for each of the values; waits for all ranks."""
        ...

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        """Returns new memory of every rank on its device; waits for all ranks. Raises
        UnreachableError."""
        ...

    def check(self) -> None:
        """Raises EngineDeadError if a sum that has ended had given up waiting for a rank, where
        sums do not raise that themselves."""

    def abort(self) -> None:
        """Ends what is under way, so that nobody waits for a rank that is gone. Call it last."""
        ...


class Alone(Collectives):
    """The one rank of a model that is not shared."""

    rank = 0
    size = 1

    @property
    def takes_parts(self) -> bool:
        return True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather_columns(self, x: Tensor) -> Tensor:
        return x

    def least(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        raise UnreachableError("there is one rank")

    def abort(self) -> None:
        """Nobody waits."""


ALONE = Alone()


class _Backend(Protocol):
    """What torch's back ends share, which their stubs do not say."""

    def allreduce(self, tensors: list[Tensor], options: c10d.AllreduceOptions) -> c10d.Work: ...

    def _allgather_base(
        self, output: Tensor, input: Tensor, options: c10d.AllgatherOptions
    ) -> c10d.Work: ...

    def abort(self) -> None: ...


def _is_ours(host: str) -> bool:
    """Whether something here could listen at `host`; a store would try for long."""
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


class Meeting:
    """Where ranks find each other: a store that rank 0 keeps, at an address that all can reach."""

    def __init__(self, host: str, size: int, port: int = 0, *, is_keeper: bool = True) -> None:
        """Rank 0 opens it on a free port of `host`. Raises EngineDeadError if it cannot."""
        self.size = size
        if is_keeper and not _is_ours(host):
            raise EngineDeadError(f"ranks cannot meet at {host}: it is no address of this host")
        try:
            self.store = c10d.TCPStore(
                host,
                port,
                size,
                is_master=is_keeper,
                timeout=timedelta(seconds=MEETING_SECONDS),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            where = f"{host}:{port}" if port else host
            raise EngineDeadError(
                f"ranks cannot meet at {where}, tried for {MEETING_SECONDS:g} s: {_first(error)}"
            ) from error
        self.host = host
        self.address = f"{host}:{self.store.port}"

    @classmethod
    def at(cls, address: str, size: int) -> Meeting:
        """Joins the meeting that rank 0 has opened at host:port. Raises EngineDeadError."""
        host, _, port = address.rpartition(":")
        return cls(host, size, int(port), is_keeper=False)

    def await_all(self, rank: int, seconds: float = MEETING_SECONDS) -> None:
        """Returns when all ranks have called it. Raises EngineDeadError naming those that have
        not."""
        self.store.set(f"here/{rank}", "1")
        missing = [f"here/{one}" for one in range(self.size)]
        try:
            self.store.wait(missing, timedelta(seconds=seconds))
        except RuntimeError as error:
            absent = [one.partition("/")[2] for one in missing if not self.store.check([one])]
            raise EngineDeadError(
                f"rank {', '.join(absent)} of {self.size} did not come to {self.address} within "
                f"{seconds:g} s"
            ) from error

    @property
    def own_host(self) -> str:
        """The address of this machine from which it reaches the meeting."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, 9))  # sends nothing
            return probe.getsockname()[0]


def _first(error: Exception) -> str:
    """Returns the first line of a message; what follows are torch's own stacks."""
    return str(error).partition("\n")[0]


class TorchCollectives(Collectives):
    """Collectives over torch's back ends: NCCL between GPUs, gloo between processes."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        """Returns when all ranks are there. Raises EngineDeadError naming those that are not."""
        self.rank = rank
        self.size = size = meeting.size
        self._meeting = meeting  # which ends with its store
        meeting.await_all(rank)
        store = meeting.store
        self._host = _gloo(c10d.PrefixStore("host", store), rank, size, meeting.own_host)
        self._group = self._host
        self._is_on_host = device.type == "cpu"
        self._peers: list[PeerMemory] = []
        if not self._is_on_host:
            self._group = _nccl(c10d.PrefixStore("device", store), rank, size)
            # So that NCCL's buffers are there before memory is planned or a graph captured.
            self.all_reduce(torch.zeros(1, device=device))

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._is_on_host and x.dtype != torch.float32:
            return x.copy_(self._reduce(self._host, x.float(), c10d.ReduceOp.SUM))
        return self._reduce(self._group, x, c10d.ReduceOp.SUM)

    def all_gather_columns(self, x: Tensor) -> Tensor:
        parts = x.new_empty((self.size, *x.shape))
        options = c10d.AllgatherOptions()
        options.asyncOp = False
        _wait(self._group._allgather_base(parts.view(-1), x.contiguous().view(-1), options))
        return parts.transpose(0, 1).reshape(len(x), -1)

    def least(self, values: Sequence[int]) -> list[int]:
        found = torch.tensor(values, dtype=torch.int64)
        return self._reduce(self._host, found, c10d.ReduceOp.MIN).tolist()

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        reason = self.unreachable()
        if not self.least([not reason])[0]:
            raise UnreachableError(reason or "another rank cannot reach the others' memory")
        name = f"octavo-{self._meeting.address}-{len(self._peers)}"
        store = c10d.PrefixStore(name, self._meeting.store)
        memory = _symmetric_memory(name, store, self.rank, self.size, num_bytes, device)
        self._peers.append(memory)
        return memory

    def unreachable(self) -> str:
        """Returns why this rank cannot reach the others' memory; empty if it may try. All ranks
        must call it."""
        store, boot = self._meeting.store, Path("/proc/sys/kernel/random/boot_id")
        store.set(
            f"boot/{self.rank}", boot.read_text() if boot.exists() else self._meeting.own_host
        )
        boots = {store.get(f"boot/{rank}") for rank in range(self.size)}
        if self._is_on_host:
            return "ranks on CPUs share no memory"
        return "" if len(boots) == 1 else "they are on several hosts"

    def abort(self) -> None:
        for memory in self._peers:
            memory.stop.fill_(1)
        # NCCL sets its kernels free at once, but returns only when no graph refers to it any more.
        thread = Thread(target=self._abort, name="octavo-abort", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS)

    def _abort(self) -> None:
        if not self._is_on_host:
            self._group.abort()
        self._host.abort()

    @staticmethod
    def _reduce(group: _Backend, x: Tensor, op: c10d.ReduceOp.RedOpType) -> Tensor:
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp(op)
        options.asyncOp = False  # NCCL: on the current stream, without a stream of its own
        _wait(group.allreduce([x], options))
        return x


def _wait(work: c10d.Work | None) -> None:
    """NCCL has nothing to wait for where it works on the current stream."""
    if work is not None:
        work.wait()


def _gloo(store: c10d.Store, rank: int, size: int, host: str) -> _Backend:
    # The stubs have another name for it than the module.
    options = c10d.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = COLLECTIVE_TIMEOUT
    # By its name, as the default listens where others can reach it.
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    return cast("_Backend", c10d.ProcessGroupGloo(store, rank, size, options))


def _nccl(store: c10d.Store, rank: int, size: int) -> _Backend:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE_TIMEOUT
    return cast("_Backend", c10d.ProcessGroupNCCL(store, rank, size, options))


def _symmetric_memory(
    name: str, store: c10d.Store, rank: int, size: int, num_bytes: int, device: torch.device
) -> PeerMemory:
    """Returns memory by torch's symmetric memory, whose interface may change: whatever it raises
    is an UnreachableError."""
    forbid_multicast()  # which nothing here uses
    try:
        module = cast("Any", c10d)  # whose stubs differ from version to version
        symmetric = module._SymmetricMemory
        group = c10d.ProcessGroup(store, rank, size)  # kept: the registry does not
        module._register_process_group(name, group)
        try:
            symmetric.set_group_info(name, rank, size, store)
            own = symmetric.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, name)
            handle = symmetric.rendezvous(own, name)
        finally:
            module._unregister_process_group(name)
        buffers = [handle.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)]
        with torch.inference_mode(False):  # whoever aborts is in no inference
            stop = torch.zeros(1, dtype=torch.int32).pin_memory()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UnreachableError(f"torch's symmetric memory: {_first(error)}") from error
    return PeerMemory(buffers=tuple(buffers), stop=stop, keeper=(own, handle, group))
