"""Several front processes over one engine: `octavo serve --api-processes N`, the parent's side.

Called by the `serve` command in place of `serve.serve`. Accepts connections and deals them out in
turn, passes on signals, the engine's end and questions about numbers; never reads a request.

    start   each front binds its sockets to the engines; then each engine process is told what for
    serve   connections are dealt out until a signal comes, the engine dies or a front does;
            one that hangs gets none, and is ended after the watchdog's time
    end     the fronts drain, each as `serve.Server` does; whoever stays too long is killed
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec

from octavo.config import EngineConfig, ServerConfig
from octavo.engine.child import ChildProcess, EngineProcess, SocketFolder, describe_end
from octavo.engine.client import EngineClient, socket_names
from octavo.engine.fleet import Fleet
from octavo.engine.fleet_link import MemberOwner
from octavo.engine.ipc import Held
from octavo.engine.link import LinkOwner
from octavo.engine.spawn import start_child
from octavo.errors import EngineDeadError
from octavo.server.channel import (
    Alive,
    AskAlive,
    AskNumbers,
    AskSiblings,
    Bind,
    Bound,
    Channel,
    Connection,
    Drained,
    EngineDied,
    Leave,
    Numbers,
    Preempt,
    Serving,
    Stop,
    ToFront,
    channel_pair,
    decode_to_parent,
)
from octavo.server.engine_client import Engine
from octavo.server.front_process import FrontArguments
from octavo.server.notice import watch_notice
from octavo.server.signals import StopSignals
from octavo.server.tenants.counts import SharedCounts

logger = logging.getLogger(__name__)

FRONT_MODULE = "octavo.server.front_process"
ACCEPTED_AT_ONCE = 64
TICK_SECONDS = 0.1
LOOK_SECONDS = 1.0
"""Between two looks whether the fronts still move."""
SKIPPED_SECONDS = 3.0
"""After so long a silence a front gets no more connections."""
GRACE_SECONDS = 8.0
"""What fronts get beyond `shutdown_timeout` to cut off what is left."""


class _Front:
    """One front process, as its parent sees it."""

    def __init__(self, fronts: Fronts, number: int) -> None:
        self.number = number
        self.is_bound: dict[int, asyncio.Event] = {}
        """By engine."""
        self.is_serving = asyncio.Event()
        self.is_drained = False
        self.silent_seconds = 0.0
        """How long it has owed an answer."""
        self._is_asked = False
        self._all_fronts = fronts
        server = replace(fronts.config, preemption_notice=None)  # the parent watches
        if number > 1:
            server = replace(server, disable_log_stats=True)  # one line for all is enough
        metrics_bound = fronts.metrics_bound if number == 1 else None
        inherited = [] if metrics_bound is None else [metrics_bound.fileno()]
        arguments = FrontArguments(
            front=number,
            num_fronts=fronts.config.api_processes,
            server=server,
            engine=fronts.engine_config,
            metrics_socket=inherited[0] if inherited else None,
            counts=fronts.counts.descriptor,
        )
        inherited.append(fronts.counts.descriptor)
        ours, theirs = channel_pair()
        with tempfile.TemporaryFile() as file, theirs:
            file.write(msgspec.msgpack.encode(arguments))
            file.seek(0)
            descriptors = (file.fileno(), theirs.fileno())
            process, lifeline = start_child(
                *(FRONT_MODULE, *map(str, descriptors)),
                descriptors=(*descriptors, *inherited),
                keeper="thread",
            )
        self.process = ChildProcess(FRONT_MODULE, process, lifeline)
        self.channel = Channel(ours, self._on_message, lambda: None)

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    def bind(self, engine: int, folder: SocketFolder) -> asyncio.Event:
        """Returns what is set once its sockets to an engine are there."""
        bound = self.is_bound[engine] = asyncio.Event()
        inbox, outbox = map(folder.address, socket_names(self.number))
        self.channel.send(Bind(engine, (inbox, outbox)))
        return bound

    def look(self) -> None:
        """Asks whether it still moves; to be called every `LOOK_SECONDS`, which are counted, not
        measured: a parent that was suspended itself would blame its fronts."""
        if self._is_asked:
            self.silent_seconds += LOOK_SECONDS
        else:
            self._is_asked = True
            self.channel.send(AskAlive())

    def _on_message(self, data: bytes, descriptor: int | None) -> None:
        message = decode_to_parent(data)
        match message:
            case Bound(engine):
                self.is_bound[engine].set()
            case Serving():
                self.is_serving.set()
            case Drained():
                self.is_drained = True
            case Alive():
                self._is_asked, self.silent_seconds = False, 0.0
            case AskSiblings(call_id):
                self._all_fronts.send_others(self.number, AskNumbers(self.number, call_id))
            case Numbers(asker):
                self._all_fronts.send(asker, message)


class Fronts:
    """The front processes of one server."""

    def __init__(
        self,
        config: ServerConfig,
        engine_config: EngineConfig,
        metrics_bound: socket.socket | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        """`metrics_bound` is served by the first front, which tells of all; `process` is that of
        the engine, if it has begun."""
        self.config = config
        self.metrics_bound = metrics_bound
        self.engine_config = engine_config
        self.counts = SharedCounts()
        self._process = process
        self._fronts: list[_Front] = []
        self._turn = 0
        self._num_stops = 0

    def connect(self, owner: LinkOwner) -> EngineClient | Fleet:
        """Returns the client of an engine process that all fronts share, or of a fleet of them."""
        if self.engine_config.data_parallel_size == 1:
            return self._client(owner, 0, process=self._process)
        return Fleet(owner, self.engine_config, self._member, self._tell_death)

    def _client(
        self,
        owner: LinkOwner,
        engine: int,
        on_held: Callable[[Held], None] | None = None,
        process: EngineProcess | None = None,
    ) -> EngineClient:
        return EngineClient(
            owner,
            1 + self.config.api_processes,
            partial(self._bind, engine),
            first_device=engine * self.engine_config.tensor_parallel_size,
            on_held=on_held,
            process=process,
        )

    def _member(self, owner: MemberOwner, engine: int) -> EngineClient:
        return self._client(owner, engine, owner.on_held)

    def _tell_death(self, engine: int, error: EngineDeadError) -> None:
        """Of one engine of a fleet, which is started again."""
        self.send_others(0, EngineDied(str(error), engine))

    async def _bind(self, engine: int, folder: SocketFolder) -> None:
        """Has all fronts bind their sockets to an engine."""
        if not self._fronts:
            numbers = range(1, 1 + self.config.api_processes)
            self._fronts = [_Front(self, number) for number in numbers]
        await self._all(*[front.bind(engine, folder) for front in self._fronts])

    async def _all(self, *events: asyncio.Event) -> None:
        """Waits for all events. Raises EngineDeadError if a front ends before."""

        async def wait() -> None:
            for event in events:
                await event.wait()

        reached = asyncio.ensure_future(wait())
        ends = [asyncio.ensure_future(front.process.wait()) for front in self._fronts]
        try:
            await asyncio.wait({reached, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for front, end in zip(self._fronts, ends, strict=True):
                if end.done() and not reached.done():
                    how = describe_end(end.result())
                    raise EngineDeadError(f"front process {front.number} {how} before it served")
        finally:
            for waiting in (reached, *ends):
                waiting.cancel()

    def send(self, number: int, message: ToFront) -> None:
        """Sends a message to one front."""
        self._fronts[number - 1].channel.send(message)

    def send_others(self, number: int, message: ToFront) -> None:
        """Sends a message to all fronts but one; number 0 leaves out none."""
        for front in self._fronts:
            if front.number != number:
                front.channel.send(message)

    async def serve(
        self,
        engine: Engine,
        bound: socket.socket,
        signals: StopSignals,
        on_serving: Callable[[], None],
    ) -> None:
        """Serves until the end; `on_serving` is called once, when all fronts answer.

        Raises EngineDeadError if the engine or a front has died.
        """
        loop = asyncio.get_running_loop()
        # Signals and hung fronts count from here on, not only once all fronts serve.
        signals.take_over(lambda: loop.call_soon_threadsafe(self._stop, engine))
        preempt = partial(self._preempt, engine)
        signals.listen_to_notice(lambda: loop.call_soon_threadsafe(preempt))
        tasks = [
            asyncio.ensure_future(self._watch()),
            asyncio.ensure_future(watch_notice(self.config, preempt)),
            asyncio.ensure_future(self._accept_when_serving(bound, on_serving)),
        ]
        try:
            error = await self._until_drained(engine)
        finally:
            for task in tasks:
                task.cancel()
            loop.remove_reader(bound.fileno())
        self.send_others(0, Leave())
        _, late = await asyncio.wait(
            [asyncio.ensure_future(front.process.wait()) for front in self._fronts],
            timeout=GRACE_SECONDS,
        )
        if late:
            self.kill()
        if error is not None:
            raise error

    async def _accept_when_serving(
        self, bound: socket.socket, on_serving: Callable[[], None]
    ) -> None:
        for front in self._fronts:
            await front.is_serving.wait()
        asyncio.get_running_loop().add_reader(bound.fileno(), self._accept, bound)
        on_serving()

    async def _watch(self) -> None:
        """Kills fronts that hang; `_death` tells of it."""
        limit = self.engine_config.watchdog_timeout or math.inf
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for front in self._fronts:
                front.look()
                if front.is_running and front.silent_seconds >= limit:
                    message = "front process %d made no progress for %g s and is killed"
                    logger.error(message, front.number, limit)
                    front.process.kill()

    async def _until_drained(self, engine: Engine) -> EngineDeadError | None:
        """Returns why it ended, if not by a signal."""
        error: EngineDeadError | None = None
        began: float | None = None
        while any(front.is_running and not front.is_drained for front in self._fronts):
            await asyncio.sleep(TICK_SECONDS)
            if error is None:
                error = await self._death(engine)
                if error is not None:
                    # Whatever has died: the requests of all have their error, and all end.
                    logger.error("the server ends: %s", error)
                    self.send_others(0, EngineDied(str(error)))
            if error is None and not self._num_stops:
                continue
            began = began or time.monotonic()
            if time.monotonic() - began > self.config.shutdown_timeout + GRACE_SECONDS:
                self.kill()
        return error

    async def _death(self, engine: Engine) -> EngineDeadError | None:
        try:
            await engine.check_health()
        except EngineDeadError as error:
            return error
        for front in self._fronts:
            code = front.process.returncode
            if code is not None and (code or not self._num_stops):
                return EngineDeadError(f"front process {front.number} {describe_end(code)}")
        return None

    def _stop(self, engine: Engine) -> None:
        if not self._num_stops:
            engine.begin_drain()
        self._num_stops += 1
        self.send_others(0, Stop())

    def _preempt(self, engine: Engine) -> None:
        if not self._num_stops:
            engine.begin_drain()
            self._num_stops = 1
        self.send_others(0, Preempt())

    def _accept(self, bound: socket.socket) -> None:
        """Deals out what waits: in turn, so that no process gets more than another."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, _ = bound.accept()
            except BlockingIOError:
                return
            except OSError as error:  # too many open files, or a client that has left already
                logger.warning("a connection was not accepted: %s", error)
                return
            running = [front for front in self._fronts if front.is_running]
            if not running:
                connection.close()
                continue
            moving = [front for front in running if front.silent_seconds < SKIPPED_SECONDS]
            running = moving or running
            self._turn += 1
            running[self._turn % len(running)].channel.send(Connection(), connection)

    def kill(self) -> None:
        """Ends all fronts at once."""
        for front in self._fronts:
            front.process.kill()

    async def close(self) -> None:
        """Ends what still runs; to be called whatever has happened."""
        self.kill()
        for front in self._fronts:
            await front.process.wait()
            front.channel.close()
        self.counts.close()
