"""One of several front processes of a server: `main` is run by `engine.parent`.

Started by `fronts`, which accepts connections and hands them over, owns the engine process and
decides when this process ends. Never listens and never starts anything.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.attached import Attached, AttachedClient
from octavo.engine.fleet import AttachedFleet
from octavo.engine.link import LinkOwner
from octavo.errors import EngineDeadError
from octavo.observe.logs import configure_logging
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
    decode_to_front,
)
from octavo.server.event_loop import new_event_loop
from octavo.server.serve import Server, settle_memory
from octavo.server.signals import StopSignals
from octavo.server.tenants.counts import SharedCounts

logger = logging.getLogger(__name__)

SIBLINGS_SECONDS = 0.4
"""How long a scrape waits for the numbers of the other front processes."""


class FrontArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent hands over at start, in a file without a name."""

    front: int
    """From 1 on; the parent's own link to the engine is 0."""
    num_fronts: int
    """Front processes in all."""
    server: ServerConfig
    engine: EngineConfig
    counts: int
    """The descriptor of what all fronts count for tenants."""
    metrics_socket: int | None = None
    """The descriptor of the port for metrics, if this front serves it."""


def main(arguments: str, control: str) -> int:
    """Serves until told to stop; returns the exit code. Takes two descriptors."""
    with open(int(arguments), "rb") as file:
        given = msgspec.msgpack.decode(file.read(), type=FrontArguments)
    configure_logging(given.server.log_format, given.server.log_level, owns_stderr=True)
    end = socket.socket(fileno=int(control))
    end.setblocking(False)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_Front(given, end).run())


class _FrontServer(Server):
    """A server that answers probes until its siblings are drained, too."""

    channel: Channel
    may_leave = False
    _is_drained = False

    def _is_over(self, now: float) -> bool:
        if super()._is_over(now) and not self._is_drained:
            self._is_drained = True
            self.channel.send(Drained())
        return self._is_drained and (self.may_leave or self.force_exit)


class _Front:
    """The life of this process."""

    def __init__(self, given: FrontArguments, end: socket.socket) -> None:
        self._given = given
        self._end = end
        self._server: _FrontServer | None = None
        self._num_stops = 0
        self._call_ids = itertools.count()
        self._calls: dict[int, tuple[asyncio.Event, list[bytes]]] = {}

    async def run(self) -> int:
        self._channel = Channel(self._end, self._on_message, self._on_parents_end)
        given = self._given
        engine = AsyncLLM(
            given.engine,
            log_format=given.server.log_format,
            log_level=given.server.log_level,
            connect=self._connect,
        )
        try:
            await engine.start()
            settle_memory()
            self._server = server = _FrontServer(
                engine,
                given.server,
                signals=StopSignals(),
                siblings=self._ask_siblings,
                counts=SharedCounts(given.counts),
            )
            server.channel = self._channel
            for _ in range(self._num_stops):
                server.stop()
            self._channel.send(Serving())
            number = given.metrics_socket
            metrics_bound = None if number is None else socket.socket(fileno=number)
            await server.run_on(None, metrics_bound)
        except EngineDeadError:
            return 1  # which the parent has told
        finally:
            await engine.close()
            self._channel.close()
        return 0 if server.error is None else 1

    def _connect(self, owner: LinkOwner) -> Attached:
        front, size = self._given.front, self._given.engine.data_parallel_size
        one = size == 1
        self._client = AttachedClient(owner, front) if one else AttachedFleet(owner, front, size)
        return self._client

    def _on_message(self, data: bytes, descriptor: int | None) -> None:
        message = decode_to_front(data)
        match message:
            case Connection():
                self._take(descriptor)
            case Bind(number, addresses):
                self._client.bind(number, addresses)
                self._channel.send(Bound(number))
            case Stop():
                self._num_stops += 1
                if self._server is not None:
                    self._server.stop()
            case Preempt():
                self._num_stops = max(self._num_stops, 1)
                if self._server is not None:
                    self._server.preempt()
            case Leave():
                if self._server is not None:
                    self._server.may_leave = True
            case AskAlive():
                self._channel.send(Alive())
            case EngineDied(text, number):
                self._client.die(EngineDeadError(text), number)
            case AskNumbers(asker, call_id):
                if self._server is not None:
                    snapshot = self._server.metrics.snapshot()
                    self._channel.send(Numbers(asker, call_id, snapshot))
            case Numbers(_, call_id, snapshot):
                if call_id in self._calls:
                    event, found = self._calls[call_id]
                    found.append(snapshot)
                    if len(found) == self._given.num_fronts - 1:
                        event.set()

    def _take(self, descriptor: int | None) -> None:
        if descriptor is None:  # this process has as many open files as it may
            logger.error("a connection was lost on its way here; raise the limit of open files")
            return
        connection = socket.socket(fileno=descriptor)
        connection.setblocking(False)
        if self._server is None:
            connection.close()
        else:
            self._server.take(connection)

    async def _ask_siblings(self) -> Sequence[bytes]:
        call_id = next(self._call_ids)
        event, found = self._calls[call_id] = asyncio.Event(), []
        self._channel.send(AskSiblings(call_id))
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), SIBLINGS_SECONDS)
        del self._calls[call_id]
        return found

    def _on_parents_end(self) -> None:
        """The lifeline ends this process, too; until then nothing new is begun."""
        if self._server is not None:
            self._server.stop()
