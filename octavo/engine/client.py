"""The front end's side of the engine process: starts it, speaks to it, notices its death.

Owned by AsyncLLM, in whose event loop it lives. Never sees text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections.abc import Callable

import msgspec
import zmq

from octavo import errors
from octavo.config import EngineConfig
from octavo.engine.child import EngineProcess, SocketFolder, describe_end
from octavo.engine.ipc import (
    AbortSequence,
    AddRequest,
    Answer,
    Deltas,
    Died,
    GetStats,
    Ready,
    Refused,
    ResetPrefixCache,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
)
from octavo.engine.vitals import Vitals
from octavo.engine.watchdog import Watchdog, await_silence, end_hung
from octavo.errors import EngineDeadError, OctavoError
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import Request
from octavo.weights.hub import ModelFiles

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0


class EngineClient:
    """One engine process. `on_deltas`, `on_refused` and `on_death` are called in the event loop."""

    def __init__(
        self,
        on_deltas: Callable[[Deltas], None],
        on_refused: Callable[[Refused], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        self._on_deltas = on_deltas
        self._on_refused = on_refused
        self._on_death = on_death
        self._calls: dict[int, asyncio.Future[EngineStats | bool]] = {}
        self._call_ids = itertools.count()
        self._error: EngineDeadError | None = None
        self._process: EngineProcess | None = None
        self._vitals: Vitals | None = None
        self._watchdog: Watchdog | None = None
        self._guard: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.prefix = ""
        """Of the ids of this front end's requests, so that two fronts of one engine differ."""
        self._ready: asyncio.Future[MemoryPlan] | None = None
        self._is_loaded = False
        self._is_closing = False
        self._folder: SocketFolder | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

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
        self._folder = folder = SocketFolder()
        self._context = context = zmq.Context()
        # Sending never waits: the queue in between is as long as it must be.
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._outbox.bind(folder.address("in"))
        self._inbox.bind(folder.address("out"))
        addresses = folder.share("in", "out")
        arguments = {
            "config": config,
            "files": files,
            "log_format": log_format,
            "log_level": log_level,
        }
        self._ready = asyncio.get_running_loop().create_future()
        self._vitals = Vitals.create()
        self._watchdog = Watchdog(config.watchdog_timeout)
        with tempfile.TemporaryFile() as file:
            file.write(msgspec.msgpack.encode(arguments, enc_hook=str))
            file.seek(0)
            descriptors = (file.fileno(), *self._vitals.descriptors)
            self._process = EngineProcess(
                *map(str, descriptors),
                *addresses,
                descriptors=(*descriptors, *folder.descriptors),
            )
        asyncio.get_running_loop().add_reader(self._inbox.FD, self._receive)
        self._watcher = asyncio.create_task(self._watch())
        return await self._ready

    def _receive(self) -> None:
        """Delivers all messages that are there: the descriptor tells of the first one alone."""
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._deliver(data)

    async def _watch(self) -> None:
        """Waits for the end of the process, delivers its last words, and tells everybody."""
        assert self._process is not None
        code = await self._process.wait()
        self._receive()
        self._die(EngineDeadError(f"the engine process {describe_end(code)}"))

    def _deliver(self, data: bytes) -> None:
        message = decode_from_engine(data)
        match message:
            case Deltas():
                self._on_deltas(message)
            case Refused():
                self._on_refused(message)
            case Answer(call_id, value):
                call = self._calls.pop(call_id, None)
                if call is not None and not call.done():
                    call.set_result(value)
            case Ready(plan):
                self._is_loaded = True
                self._guard = asyncio.create_task(self._end_if_hung())
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(plan)
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
        if self._error is not None:
            return
        self._error = error
        if self._is_loaded and not self._is_closing:
            stacks = "" if self._vitals is None else self._vitals.stacks()
            logger.error("%s%s", error, stacks and f"\n{stacks}")
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        self._on_death(error)

    @property
    def is_dead(self) -> bool:
        return self._error is not None

    def check_alive(self) -> None:
        """Raises EngineDeadError if the process has ended or was never started."""
        if self._error is not None:
            raise self._error
        if self._process is None:
            raise EngineDeadError("the engine is not started")

    def _send(self, message: ToEngine) -> None:
        self.check_alive()
        try:
            self._outbox.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # The queue has no end, so this means that nobody is there: waiting would hold the
            # event loop for ever, and with it the news of the death.
            raise EngineDeadError("the engine process has ended") from None

    def add(self, request: Request) -> None:
        self._send(AddRequest(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Nothing to do if the engine is dead: its sequences are gone."""
        if self._error is None:
            self._send(AbortSequence(request_id, index))

    async def stats(self) -> EngineStats:
        call_id = next(self._call_ids)
        value = await self._call(call_id, GetStats(call_id))
        assert isinstance(value, EngineStats)
        return value

    async def reset_prefix_cache(self) -> bool:
        call_id = next(self._call_ids)
        return bool(await self._call(call_id, ResetPrefixCache(call_id)))

    async def _call(self, call_id: int, message: ToEngine) -> EngineStats | bool:
        future: asyncio.Future[EngineStats | bool] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._send(message)
            return await future
        finally:
            self._calls.pop(call_id, None)

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
        if self._context is not None:
            asyncio.get_running_loop().remove_reader(self._inbox.FD)
            self._outbox.close(linger=0)
            self._inbox.close(linger=0)
            self._context.term()
            self._context = None
        if self._folder is not None:
            self._folder.close()
        vitals, self._vitals = self._vitals, None
        if vitals is not None:
            vitals.close()

    async def _end(self, process: EngineProcess) -> None:
        if not self._is_loaded:
            process.kill()  # it has nothing to finish
        if process.returncode is None:
            with contextlib.suppress(zmq.Again):  # it is gone, or ends by itself
                self._outbox.send(encode(Shutdown()), zmq.NOBLOCK)
            try:
                await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._guard is not None:
            self._guard.cancel()
