"""HTTP/1.1 on one connection: uvicorn's protocol with the bounds that it lacks.

Handed to `uvicorn.Config(http=...)` by `serve`; one object a connection, called by the event loop.
Never reads a body into a request and never keeps one.

What a client may do to one connection, and what it is told (an error object, then the end):

    nothing, or headers that do not end      408 after `header_seconds`
    a body that does not come                408 after `body_seconds` for each piece of it
    nothing after an answer                  closed after `idle_seconds`
    an answer that is not read at all        cut off after `unread_seconds`
    more header than fits                    431
    a connection too many                    503 with Retry-After
    requests before their turn (pipelined)   MAX_PIPELINED of them, then 400
    a body that nobody wants any more        MAX_DISCARDED_BYTES of it, then closed
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if sys.platform == "linux":
    import fcntl
    import termios

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from octavo.observe.loop_holds import LoopHoldMonitor
from octavo.server.answer_wire import WIRE, AnswerWire
from octavo.server.errors import ApiError, error_body, error_response

logger = logging.getLogger(__name__)

FEED_BYTES = 32 * 1024
"""Bytes parsed in one callback: a megabyte of chunks of one byte each would hold the loop."""
BODY_PIECE_BYTES = 4 * 2**20
MAX_PIPELINED = 16
MAX_DISCARDED_BYTES = 64 * 2**20
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one connection may take; how many there may be."""

    header_seconds: float = 20.0
    """From the connection or the first byte of a request to the end of its headers."""
    body_seconds: float = 60.0
    """For every BODY_PIECE_BYTES of a body: 4 MiB at 70 KB/s."""
    idle_seconds: float = 65.0
    """Between requests. Longer than the 60 seconds of common proxies, which then close first."""
    unread_seconds: float = 60.0
    """In which a client that has an answer waiting must have taken some of it."""
    max_header_bytes: int = 64 * 1024
    max_headers: int = 128
    max_connections: int = 8192


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Returns the fastest loop there is: uvloop's, except on Windows, which has none."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def protocol_factory(
    limits: ConnectionLimits, monitor: LoopHoldMonitor | None = None
) -> Callable[..., asyncio.Protocol]:
    """Returns what `uvicorn.Config(http=...)` wants. `monitor` measures what sockets call."""

    def make(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        protocol = BoundedHttpProtocol(limits, config, server_state, app_state, _loop)
        if monitor is not None:
            measured = functools.partial(monitor.measure, protocol.data_received)
            protocol.data_received = measured  # type: ignore[method-assign]
        return protocol

    return make


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. At most one deadline for what it sends runs at a time, none while a request
    is answered, and one for what it reads while something waits to be read."""

    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.timeout_keep_alive = limits.idle_seconds
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._num_unread = 0  # bytes that waited to be read when `_unread` was armed
        self._reads = "headers"  # or "body", or "nothing" until the next request begins
        self._has_moved = False  # whether `_reads` was set since the deadline was armed
        self._num_header_bytes = 0  # as they came, until the headers are complete
        self._num_named_bytes = 0  # of the headers that are complete
        self._num_discarded = 0
        self._num_piece_bytes = 0  # of a body, since its deadline was armed
        self._backlog = bytearray()
        self._answering: RequestResponseCycle | None = None
        self._is_surplus = False

    # -- the connection ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_surplus = len(self.connections) > self._limits.max_connections
        if len(self.connections) > 2 * self._limits.max_connections:
            transport.close()  # Too many even to be told so.
        else:
            self._arm_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reads = "nothing"
        self._arm_deadline()
        if self._unread is not None:
            self._unread.cancel()
        self._backlog.clear()
        super().connection_lost(exc)
        # Uvicorn tells the newest request only; with pipelining, it is an older one that runs.
        for cycle in (self._answering, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                if (wire := AnswerWire.of(cycle.scope)) is not None:  # type: ignore[arg-type]
                    wire.tell_gone()
        self.pipeline.clear()

    def _arm_deadline(self) -> None:
        """Begins the time of what is read now; the deadline before it is off."""
        self._has_moved = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        limits = self._limits
        if self._reads != "nothing":
            seconds = limits.header_seconds if self._reads == "headers" else limits.body_seconds
            self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.flow.read_paused or self._backlog:
            self._arm_deadline()  # It is not the client who is late: nobody reads.
        elif self._reads == "headers" and not self._num_header_bytes:
            self.transport.close()  # It has not even begun to ask.
        else:
            message = f"the {self._reads} of the request did not come in time"
            self._end(ApiError(408, message, code="request_timeout"))

    def _end(self, error: ApiError) -> None:
        """Tells the client why, unless an answer is under way, and closes the connection."""
        self._reads = "nothing"
        self._arm_deadline()
        self._backlog.clear()
        if self.transport.is_closing():
            return
        logger.info("a connection ends: %s", error, extra={"status": error.status})
        cycle = self._answering
        is_free = cycle is None or cycle.response_complete or not cycle.response_started
        if is_free and not self.pipeline:
            self.transport.write(_raw_response(error))
        self.transport.close()
        self._watch_unread()

    # -- what goes out -----------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def _watch_unread(self) -> None:
        """Begins the time in which the client must read some of what waits: even a transport
        that is closed waits for that."""
        if self._unread is not None:
            self._num_unread = sys.maxsize  # More has been written since: it was read before.
        elif self.transport.get_write_buffer_size():
            self._arm_unread()

    def _arm_unread(self) -> None:
        self._num_unread = self._num_unread_bytes()
        self._unread = self.loop.call_later(self._limits.unread_seconds, self._on_unread)

    def _on_unread(self) -> None:
        self._unread = None
        if not self.transport.get_write_buffer_size():
            return
        if self._num_unread_bytes() < self._num_unread or self._is_writing():
            self._arm_unread()
            return
        logger.info("a connection ends: the client does not read its answer")
        self.transport.abort()

    def _is_writing(self) -> bool:
        """Whether an answer is under way that the client takes as fast as it comes."""
        cycle = self._answering
        is_over = cycle is None or cycle.response_complete or self.transport.is_closing()
        return not is_over and not self.flow.write_paused

    def _num_unread_bytes(self) -> int:
        """Returns what waits here and in the kernel, which takes more in large steps only: of a
        slow reader's progress, its own buffer alone would tell nothing for minutes."""
        num_bytes = self.transport.get_write_buffer_size()
        if sys.platform == "linux":
            sock = self.transport.get_extra_info("socket")
            in_kernel = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
            num_bytes += int.from_bytes(in_kernel, sys.byteorder)
        return num_bytes

    # -- what comes in -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self._backlog and len(data) <= FEED_BYTES:
            self._feed(data)
            return
        is_first = not self._backlog
        self._backlog += data
        self.transport.pause_reading()
        if is_first:
            self._feed_next()

    def _feed_next(self) -> None:
        """Parses a piece of the backlog, lets others run, and goes on."""
        piece = bytes(self._backlog[:FEED_BYTES])
        del self._backlog[:FEED_BYTES]
        if piece and self.parser is not None and not self.transport.is_closing():
            self._feed(piece)
        if self._backlog:
            self.loop.call_soon(self._feed_next)
        elif not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        assert self.parser is not None
        self._unset_keepalive_if_required()
        # What belongs to a body counts too, for this one time: the limit is far above it.
        self._num_header_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # Whoever asks for another protocol is answered in this one.
        except httptools.HttpParserError as error:
            why = error.__context__ or error
            if not isinstance(why, ApiError):
                why = ApiError(400, f"this is no valid HTTP request: {why}", code="bad_http")
            self._end(why)
            return
        if self._reads != "headers":
            self._num_header_bytes = 0
        elif self._num_header_bytes > self._limits.max_header_bytes:
            self._end(self._too_large())
            return
        if self._has_moved:
            self._arm_deadline()

    def _too_large(self) -> ApiError:
        limits = self._limits
        message = (
            f"the request's line and headers have more than {limits.max_header_bytes} bytes or "
            f"{limits.max_headers} headers"
        )
        return ApiError(431, message, code="headers_too_large")

    # -- what the parser calls ---------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            message = f"more than {MAX_PIPELINED} requests wait on this connection"
            raise ApiError(400, message, code="too_many_pipelined")
        self._reads, self._has_moved = "headers", True
        self._num_named_bytes = 0
        super().on_message_begin()
        self.scope["extensions"] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_named_bytes += len(name) + len(value)
        is_long = self._num_named_bytes > self._limits.max_header_bytes
        if is_long or len(self.headers) >= self._limits.max_headers:
            raise self._too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reads, self._has_moved = "body", True
        self._num_discarded = self._num_piece_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_piece_bytes += len(body)
        if self._num_piece_bytes >= BODY_PIECE_BYTES:
            self._num_piece_bytes, self._has_moved = 0, True
        if self.cycle is not None and self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reads, self._has_moved = "nothing", True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.scope["extensions"][WIRE] = AnswerWire(cycle)  # type: ignore[typeddict-item, index]
        super()._start_asgi_task(cycle, _surplus if self._is_surplus else app)


def _raw_response(error: ApiError) -> bytes:
    body = msgspec.json.encode(error_body(error))
    head = (
        f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
}


async def _surplus(scope: Any, receive: Any, send: Any) -> None:
    """The app of connections beyond the limit."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "Connection": "close"}
    message = "the server has as many connections as it may have; try again later"
    error = ApiError(503, message, code="too_many_connections", headers=headers)
    await error_response(error, scope)(scope, receive, send)
