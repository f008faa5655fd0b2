"""The short way of a streamed answer's pieces: from the route to its connection.

Made by `http_protocol` for each request, used by `streaming`. The layers around the app see the
head and the end of the answer; of what is between they have nothing to say. Never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_SIZES = tuple(b"%x\r\n" % size for size in range(1024))
"""How pieces begin of so many bytes: nearly all are short."""
WIRE = "octavo.wire"
"""The key in a scope's `extensions` of its AnswerWire."""


class AnswerWire:
    """Writes pieces of one answer's body, as `send` would, once its head has passed `send`."""

    __slots__ = ("_cycle", "_on_gone")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._on_gone: Callable[[], None] | None = None

    @staticmethod
    def of(scope: Scope) -> AnswerWire | None:
        """Returns the wire of a request, if it came by a connection of ours."""
        return scope.get("extensions", {}).get(WIRE)

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """Has `on_gone`, in place of another, called when the client leaves or if it has left.
        The request's body must have been received."""
        self._on_gone = on_gone
        if on_gone is not None:
            self._cycle.flow.resume_reading()  # Else nobody would see it leave.
            if self._cycle.disconnected:
                on_gone()

    def tell_gone(self) -> None:
        """The client has left."""
        if self._on_gone is not None:
            self._on_gone()

    @property
    def is_open(self) -> bool:
        """Whether pieces may be written: the answer has begun and has no length of its own."""
        cycle = self._cycle
        return cycle.response_started and cycle.chunked_encoding is True

    def hold_head(self) -> None:
        """Lets the head wait for the piece that follows at once: both are then one write."""
        self._cycle.transport = _HeldHead(self._cycle)  # type: ignore[assignment]

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly; `drained` waits until it does not."""
        cycle = self._cycle
        return cycle.flow.write_paused and not cycle.disconnected

    async def drained(self) -> None:
        await self._cycle.flow.drain()

    def write(self, piece: bytes) -> None:
        """Writes one piece that is not empty; nothing if the client is gone."""
        cycle = self._cycle
        if not cycle.disconnected:
            num_bytes = len(piece)
            size = _SIZES[num_bytes] if num_bytes < len(_SIZES) else b"%x\r\n" % num_bytes
            cycle.transport.write(b"".join((size, piece, b"\r\n")))

    def hang_up(self) -> None:
        """Ends the connection at once, whatever of the answer is still to be sent: a client that
        does not read would never take it."""
        self._cycle.transport.abort()


class _HeldHead:
    """Stands in for a transport until its second write, which takes the first one along."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport: asyncio.Transport = cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._cycle.transport = self._transport
            self._transport.write(self._head + data)
        else:
            self._head = data

    def abort(self) -> None:
        self._transport.abort()

    def close(self) -> None:
        self._cycle.transport = self._transport
        self._transport.write(self._head)
        self._transport.close()
