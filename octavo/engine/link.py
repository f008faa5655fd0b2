"""One front end's side of the conversation with an engine process: messages out and in.

Owned by a client (`client` starts the process, `attached` joins one), in whose event loop it lives.
Never sees text, and never starts or ends a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from octavo.engine.ipc import (
    AbortSequence,
    AddRequests,
    Answer,
    Deltas,
    Explained,
    ExplainPrefix,
    FromEngine,
    GetStats,
    Refused,
    ResetPrefixCache,
    ToEngine,
    decode_from_engine,
    encode,
)
from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.kv_cache.explain import PrefixExplanation
from octavo.observe.stats import EngineStats
from octavo.request import Request

_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
"""Plain numbers: a member of an enumeration takes twice as long to ask with."""
MAX_TOGETHER = 64
"""Requests in one message: the engine may begin with these."""
Value = EngineStats | PrefixExplanation | bool
"""What a call comes to."""


class LinkOwner(Protocol):
    """Who is told of the engine's news, in the event loop."""

    def on_deltas(self, message: Deltas) -> None: ...

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        """One request has ended without an answer."""
        ...

    def on_death(self, error: EngineDeadError) -> None: ...


class Link(Protocol):
    """What AsyncLLM asks of its engine, or of a fleet of them. `add` and what is awaited raise
    EngineDeadError."""

    prefix: str
    """Of the ids of this front end's requests, by which engines find whom to tell."""

    @property
    def error(self) -> EngineDeadError | None:
        """Why nothing can be sent any more."""
        ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    async def stats(self, is_detailed: bool = False) -> EngineStats: ...

    async def reset_prefix_cache(self) -> bool: ...

    async def explain_prefix(self, request: Request) -> PrefixExplanation: ...


class EngineLink:
    """The sockets of one front end, number `front` of those that the engine has."""

    def __init__(
        self, owner: LinkOwner, front: int, on_other: Callable[[FromEngine], None]
    ) -> None:
        """`on_other` is told what speaks of the engine process itself."""
        self.front = front
        self.prefix = f"{front}-"
        self._error: EngineDeadError | None = None
        self._owner = owner
        self._on_other = on_other
        self._calls: dict[int, asyncio.Future[Value]] = {}
        self._call_ids = itertools.count()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._added: list[msgspec.Raw] = []
        """Requests that wait for the end of this round of the event loop."""

    @property
    def error(self) -> EngineDeadError | None:
        return self._error

    def bind(self, inbox_of_engine: str, outbox_of_engine: str) -> None:
        """Binds the two sockets, named as the engine sees them, and listens."""
        self._context = context = zmq.Context()
        # Sending never waits: the queue in between is as long as it must be.
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._inbox = context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._outbox.bind(inbox_of_engine)
        self._inbox.bind(outbox_of_engine)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inbox.FD, self.receive)

    def receive(self) -> None:
        """Delivers all messages that are there: the descriptor tells of the first one alone."""
        # Asked first, since an exception for each last one would cost as much as a message.
        while self._context is not None and self._inbox.get(_EVENTS) & _POLLIN:  # type: ignore[operator]
            message = decode_from_engine(self._inbox.recv(zmq.NOBLOCK))
            match message:
                case Deltas():
                    self._owner.on_deltas(message)
                case Refused():
                    self._owner.on_failed(message.request_id, OverloadedError(message.message))
                case Answer(call_id, value) | Explained(call_id, value):
                    call = self._calls.pop(call_id, None)
                    if call is not None and not call.done():
                        call.set_result(value)
                case _:
                    self._on_other(message)

    def die(self, error: EngineDeadError) -> None:
        """Fails all that waits, once; from now on nothing can be sent."""
        if self._error is not None:
            return
        self._error = error
        self._added.clear()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()
        self._owner.on_death(error)

    def send(self, message: ToEngine) -> None:
        """Hands a message over, behind what was added before. Raises EngineDeadError."""
        self._check_open()
        self._send_added()
        self._send(message)

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._context is None:
            raise EngineDeadError("the engine is not started")

    def _send(self, message: ToEngine) -> None:
        try:
            self._outbox.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # The queue has no end, so this means that nobody is there: waiting would hold the
            # event loop for ever, and with it the news of the death.
            raise EngineDeadError("the engine process has ended") from None

    def add(self, request: Request) -> None:
        """Hands a request over together with others of the same round of the event loop: a message
        for each would cost as much as all that is done for it before."""
        self._check_open()
        assert self._loop is not None, "bound"
        if not self._added:
            self._loop.call_soon(self._send_late)
        self._added.append(msgspec.Raw(encode(request)))
        if len(self._added) >= MAX_TOGETHER:
            self._send_added()

    def _send_added(self) -> None:
        if self._added:
            added, self._added = self._added, []
            self._send(AddRequests(added))

    def _send_late(self) -> None:
        if self._context is not None and self._error is None:
            # If nobody is there any more, the news of it ends these requests with all others.
            with contextlib.suppress(EngineDeadError):
                self._send_added()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Nothing to do if the engine is dead: its sequences are gone."""
        if self.error is None:
            self.send(AbortSequence(request_id, index))

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        call_id = next(self._call_ids)
        value = await self._call(call_id, GetStats(call_id, self.front, is_detailed))
        assert isinstance(value, EngineStats)
        return value

    async def reset_prefix_cache(self) -> bool:
        call_id = next(self._call_ids)
        return bool(await self._call(call_id, ResetPrefixCache(call_id, self.front)))

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        call_id = next(self._call_ids)
        value = await self._call(call_id, ExplainPrefix(call_id, request, self.front))
        assert isinstance(value, PrefixExplanation)
        return value

    async def _call(self, call_id: int, message: ToEngine) -> Value:
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self.send(message)
            return await future
        finally:
            self._calls.pop(call_id, None)

    def close(self) -> None:
        """Lets the sockets go. May be called twice."""
        if self._context is not None:
            asyncio.get_running_loop().remove_reader(self._inbox.FD)
            self._outbox.close(linger=0)
            self._inbox.close(linger=0)
            self._context.term()
            self._context = None
            self._added.clear()
