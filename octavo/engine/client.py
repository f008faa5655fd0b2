"""The engine process of a front end: started, watched and ended.

Owned by AsyncLLM, in whose event loop it lives; what is said to the process goes through its
`link`. Never sees text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import zmq

from octavo import errors
from octavo.config import EngineConfig
from octavo.engine.child import EngineProcess, SocketFolder, describe_end
from octavo.engine.ipc import AwaitRanks, Died, FromEngine, Held, Ready, Shutdown
from octavo.engine.link import EngineLink, Link, LinkOwner
from octavo.engine.vitals import Vitals
from octavo.engine.watchdog import Watchdog, await_silence, end_hung
from octavo.errors import EngineDeadError, OctavoError
from octavo.kv_cache.planner import MemoryPlan
from octavo.weights.hub import ModelFiles

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0

BindFronts = Callable[[SocketFolder], Awaitable[None]]
"""Has the other front ends bind their sockets (`socket_names`) in the folder."""


class RemoteStart(Protocol):
    """Starts the ranks of an engine elsewhere."""

    host: str
    """The address of this host that they come to."""

    def start(self, address: str, key: bytes) -> None:
        """Has ranks 1 and up come to host:port with this key; must not wait for them."""
        ...


class Client(Protocol):
    """What AsyncLLM needs of whoever holds its link."""

    @property
    def link(self) -> Link: ...

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Returns the memory plan once requests can be taken. Raises OctavoError."""
        ...

    def begin_drain(self) -> None: ...

    def kill(self) -> None: ...

    async def close(self) -> None: ...


def socket_names(front: int) -> tuple[str, str]:
    """Returns the names of a front end's sockets in the folder: what the engine reads, writes."""
    return f"in-{front}", f"out-{front}"


class EngineClient:
    """One engine process, for the front end `link` and for others that are its guests."""

    def __init__(
        self,
        owner: LinkOwner,
        num_fronts: int = 1,
        bind_others: BindFronts | None = None,
        *,
        first_device: int = 0,
        on_held: Callable[[Held], None] | None = None,
        remote_ranks: RemoteStart | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        """`num_fronts` counts this one; `bind_others` is called if there are more. An engine of a
        fleet has GPUs from `first_device` on, and tells what it holds. `remote_ranks`: who starts
        its tensor parallel ranks, if not the engine process. `process` is one that has begun."""
        self.link = EngineLink(owner, 0, self._on_message)
        self._num_fronts = num_fronts
        self._first_device = first_device
        self._on_held = on_held
        self._remote_ranks = remote_ranks
        self._bind_others = bind_others
        self._process = process
        self._vitals: Vitals | None = None
        self._watchdog: Watchdog | None = None
        self._guard: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[MemoryPlan] | None = None
        self._is_loaded = False
        self._is_closing = False
        self._folder: SocketFolder | None = None

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Starts the process; returns its memory plan once it can take requests.

        Raises the OctavoError that ended it, or EngineDeadError.
        """
        try:
            return await self._start(config, files, log_format, log_level)
        except BaseException:
            await self.close()
            raise

    async def _start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        self.begin()
        self._folder = folder = SocketFolder()
        self.link.bind(*map(folder.address, socket_names(0)))
        if self._bind_others is not None:
            await self._bind_others(folder)
        names = [name for front in range(self._num_fronts) for name in socket_names(front)]
        arguments = {
            "config": config,
            "files": files,
            "log_format": log_format,
            "log_level": log_level,
            "addresses": folder.share(*names),
            "first_device": self._first_device,
            "is_in_fleet": self._on_held is not None,
            "rank_host": self._remote_ranks and self._remote_ranks.host,
        }
        self._ready = asyncio.get_running_loop().create_future()
        self._vitals = Vitals.create()
        self._watchdog = Watchdog(config.watchdog_timeout)
        data = msgspec.msgpack.encode(arguments, enc_hook=str)
        descriptors = (*self._vitals.descriptors, *folder.descriptors)
        assert self._process is not None
        await asyncio.to_thread(self._process.tell, data, descriptors)
        self._watcher = asyncio.create_task(self._watch())
        return await self._ready

    def begin(self) -> None:
        """Starts the process, which imports what it needs until `start` says what for."""
        if self._process is None:
            self._process = EngineProcess()

    async def _watch(self) -> None:
        """Waits for the end of the process, delivers its last words, and tells everybody."""
        assert self._process is not None
        code = await self._process.wait()
        self.link.receive()
        self._die(EngineDeadError(f"the engine process {describe_end(code)}"))

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Ready(plan):
                self._is_loaded = True
                self._guard = asyncio.create_task(self._end_if_hung())
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(plan)
            case AwaitRanks(address, key):
                assert self._remote_ranks is not None
                self._remote_ranks.start(address, key)
            case Held() if self._on_held is not None:
                self._on_held(message)
            case Died(kind, text):
                self._fail_start(kind, text)
                self._die(EngineDeadError(f"the engine process ended: {text}"))

    async def _end_if_hung(self) -> None:
        """Answers open requests before it looks further: they have waited long enough."""
        assert self._watchdog is not None
        assert self._vitals is not None
        assert self._process is not None
        process = self._process
        silent = await await_silence(self._watchdog, self._vitals)
        self._die(EngineDeadError(f"the engine made no progress for {silent:.0f} s"))
        await end_hung(process, self._vitals)

    def begin_drain(self) -> None:
        """From now on a step without progress is not waited for as long."""
        if self._watchdog is not None:
            self._watchdog.is_draining = True

    def _fail_start(self, kind: str, text: str) -> None:
        """Before it is ready, the process ends with the error that the user should see."""
        if self._ready is not None and not self._ready.done():
            error = vars(errors).get(kind, EngineDeadError)
            assert issubclass(error, OctavoError)
            self._ready.set_exception(error(text))

    def _die(self, error: EngineDeadError) -> None:
        if self.link.error is not None:
            return
        if self._is_loaded and not self._is_closing:
            stacks = "" if self._vitals is None else self._vitals.stacks()
            logger.error("%s%s", error, stacks and f"\n{stacks}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        self.link.die(error)

    def kill(self) -> None:
        """Ends the process at once; `close` is still to be called."""
        self._is_closing = True
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """Ends the process, by force after SHUTDOWN_SECONDS. May be called twice."""
        self._is_closing = True
        if self._process is not None:
            await self._end(self._process)
            self._process = None
        for task in (self._watcher, self._guard):
            if task is not None:
                await asyncio.wait({task})
        self.link.close()
        if self._folder is not None:
            self._folder.close()
        vitals, self._vitals = self._vitals, None
        if vitals is not None:
            vitals.close()

    async def _end(self, process: EngineProcess) -> None:
        if not self._is_loaded:
            await process.end()  # it has nothing to finish
        elif process.returncode is None:
            with contextlib.suppress(EngineDeadError, zmq.ZMQError):  # gone, or it ends by itself
                self.link.send(Shutdown())
            try:
                await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
            except TimeoutError:
                await process.end()
        if self._guard is not None:
            self._guard.cancel()
