"""Messages between the parent of several front processes and each of them, and connections.

Used by `fronts` (the parent) and `front_process`. One socket pair a front; never blocks.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

import msgspec

MAX_MESSAGE_BYTES = 128 * 1024
_MAX_DESCRIPTORS = 1


class Bind(msgspec.Struct, frozen=True, tag=True):
    """An engine is about to be started, perhaps again: what it reads and writes has these names."""

    engine: int
    addresses: tuple[str, str]


class Bound(msgspec.Struct, frozen=True, tag=True):
    """A front's sockets to an engine are there: the engine may be started."""

    engine: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """A front takes connections."""


class Connection(msgspec.Struct, frozen=True, tag=True):
    """A client's connection, whose socket travels beside the message."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """A signal has come: the first begins the drain, the second ends it."""


class Preempt(msgspec.Struct, frozen=True, tag=True):
    """The machine is about to go: the drain begins, what has not begun is handed back."""


class Drained(msgspec.Struct, frozen=True, tag=True):
    """A front has nothing open any more; it goes on answering probes."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """All fronts are drained, and no more connections come."""


class AskAlive(msgspec.Struct, frozen=True, tag=True):
    """The parent wants to know whether a front's event loop goes round."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """It does."""


class EngineDied(msgspec.Struct, frozen=True, tag=True):
    message: str
    engine: int | None = None
    """None: all of them."""


class AskSiblings(msgspec.Struct, frozen=True, tag=True):
    """A front is scraped and wants the numbers of all others."""

    call_id: int


class AskNumbers(msgspec.Struct, frozen=True, tag=True):
    """The parent passes the question on."""

    asker: int
    call_id: int


class Numbers(msgspec.Struct, frozen=True, tag=True):
    """A front's numbers for a sibling, as `observe.snapshot` packs them."""

    asker: int
    call_id: int
    snapshot: bytes


ToFront = Bind | Connection | Stop | Preempt | Leave | AskAlive | EngineDied | AskNumbers | Numbers
ToParent = Bound | Serving | Drained | Alive | AskSiblings | Numbers

_encode = msgspec.msgpack.Encoder().encode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
decode_to_parent = msgspec.msgpack.Decoder(ToParent).decode


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Returns two ends that keep messages apart."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


class Channel:
    """One end of a pair in an event loop. What cannot be sent at once waits here, in order."""

    def __init__(
        self,
        end: socket.socket,
        on_message: Callable[[bytes, int | None], None],
        on_end: Callable[[], None],
    ) -> None:
        """`on_message` is told of each message and the descriptor that came with it, which is its
        own; `on_end` of the other side's end."""
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_end = on_end
        self._waiting: deque[tuple[bytes, socket.socket | None]] = deque()
        self._loop.add_reader(end.fileno(), self._read)

    def send(self, message: ToFront | ToParent, connection: socket.socket | None = None) -> None:
        """Sends a message, and a connection with it, whose socket here is closed."""
        self._waiting.append((_encode(message), connection))
        if len(self._waiting) == 1:
            self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                data, connection = self._waiting[0]
                if connection is None:
                    self._end.send(data)
                else:
                    socket.send_fds(self._end, [data], [connection.fileno()])
                    connection.close()
                self._waiting.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._end.fileno(), self._write)
            return
        except OSError:  # the other side is gone, which the reader tells
            for _, connection in self._waiting:
                if connection is not None:
                    connection.close()
            self._waiting.clear()
        self._loop.remove_writer(self._end.fileno())

    def _read(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self._end, MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS
                )
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._loop.remove_reader(self._end.fileno())
                self._on_end()
                return
            self._on_message(data, descriptors[0] if descriptors else None)

    def close(self) -> None:
        """Lets the socket go. May be called twice."""
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._loop.remove_writer(self._end.fileno())
            self._end.close()
