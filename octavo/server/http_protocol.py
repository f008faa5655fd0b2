"""HTTP/1.1 on one connection, with bounds for all that a client may do to it.

Handed to `uvicorn.Config(http=...)` by `serve`; one object a connection. Never keeps a body.

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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from octavo.observe.loop_holds import LoopHoldMonitor
from octavo.server.errors import ApiError
from octavo.server.http_cycle import HttpCycle
from octavo.server.http_offers import head_without_offer, new_parser
from octavo.server.http_refusals import headers_too_large, raw_response, surplus
from octavo.server.http_scope import Scopes
from octavo.server.http_unread import UnreadWatch

logger = logging.getLogger(__name__)

FEED_BYTES = 32 * 1024
"""Bytes parsed in one callback: a megabyte of chunks of one byte each would hold the loop."""
BODY_PIECE_BYTES = 4 * 2**20
MAX_PIPELINED = 16
TOO_MANY_PIPELINED = "too_many_pipelined"
MAX_DISCARDED_BYTES = 64 * 2**20


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


class BoundedHttpProtocol(asyncio.Protocol):
    """One connection. At most one deadline for what it sends runs at a time, none while a request
    is answered, and one for what it reads while something waits to be read.

    Uvicorn's server makes it, and asks for its `shutdown`.
    """

    transport: asyncio.Transport
    flow: FlowControl

    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._app = config.loaded_app
        self._config, self._app_state = config, app_state
        self._server_state = server_state
        self._connections: set[Any] = server_state.connections
        self._limits = limits
        self._parser: Any = new_parser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expects_continue = False
        self._is_offer = False  # whether the headers offer to go on in another protocol
        self._newest: HttpCycle | None = None
        self._answering: HttpCycle | None = None
        """An older one while requests wait in the pipeline."""
        self._pipeline: deque[HttpCycle] = deque()
        self._last_word: ApiError | None = None
        """What the client is told after the answers that are owed."""
        self._deadline: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        """When the last answer was complete, in the loop's time; None while something comes."""
        self._reads = "headers"  # or "body", or "nothing" until the next request begins
        self._has_moved = False  # whether `_reads` was set since the deadline was armed
        self._num_header_bytes = 0  # as they came, until the headers are complete
        self._num_named_bytes = 0  # of the headers that are complete
        self._num_discarded = 0
        self._num_piece_bytes = 0  # of a body, since its deadline was armed
        self._backlog = bytearray()
        self._is_surplus = False

    # -- the connection ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.flow = FlowControl(transport)
        self._unread = UnreadWatch(
            transport, self._loop, self._limits.unread_seconds, self._is_writing
        )
        self._scopes = Scopes(self._config, self._app_state, transport)
        self._connections.add(self)
        self._is_surplus = len(self._connections) > self._limits.max_connections
        if len(self._connections) > 2 * self._limits.max_connections:
            transport.close()  # Too many even to be told so.
        else:
            self._arm_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reads = "nothing"
        self._arm_deadline()
        self._unread.stop()
        if self._idle is not None:
            self._idle.cancel()
        self._backlog.clear()
        self._connections.discard(self)
        self._parser = None
        for cycle in {self._answering, *self._pipeline} - {None}:
            cycle.leave()
        self._pipeline.clear()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()

    def _arm_deadline(self) -> None:
        """Begins the time of what is read now; the deadline before it is off."""
        self._has_moved = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        limits = self._limits
        if self._reads != "nothing":
            seconds = limits.header_seconds if self._reads == "headers" else limits.body_seconds
            self._deadline = self._loop.call_later(seconds, self._on_deadline)

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
        if error.code == TOO_MANY_PIPELINED:  # those before it are whole
            self._last_word = error
            self.flow.pause_reading()
            return
        cycle = self._answering
        is_free = cycle is None or cycle.response_complete or not cycle.response_started
        if is_free and not self._pipeline:
            self.transport.write(raw_response(error))
        self.transport.close()
        self._unread.look()

    # -- what goes out -----------------------------------------------------------------------

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._unread.look()

    def resume_writing(self) -> None:
        self.flow.resume_writing()

    def _is_writing(self) -> bool:
        """Whether an answer is under way that the client takes as fast as it comes."""
        cycle = self._answering
        is_over = cycle is None or cycle.response_complete or self.transport.is_closing()
        return not is_over and not self.flow.write_paused

    def _on_complete(self) -> None:
        """An answer is written to its end: the next request has its turn."""
        self._server_state.total_requests += 1
        if not self.transport.is_closing():
            if self._last_word is None:
                self.flow.resume_reading()
            if self._pipeline:
                self._start(self._pipeline.popleft())
            elif self._last_word is not None:
                self.transport.write(raw_response(self._last_word))
                self.transport.close()
            else:
                self._begin_idling()
        self._unread.look()

    def _begin_idling(self) -> None:
        # One timer for all requests of the connection: it looks when it is due.
        self._idle_since = self._loop.time()
        if self._idle is None:
            self._idle = self._loop.call_later(self._limits.idle_seconds, self._on_idle)

    def _on_idle(self) -> None:
        self._idle = None
        if self._idle_since is None or self.transport.is_closing():
            return
        seconds = self._idle_since + self._limits.idle_seconds - self._loop.time()
        if seconds > 0:
            self._idle = self._loop.call_later(seconds, self._on_idle)
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """Uvicorn's server ends: so does the connection, after the answer that is under way."""
        if self._newest is None or self._newest.response_complete:
            self.transport.close()
        else:
            self._newest.keep_alive = False

    # -- what comes in -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._last_word is not None:
            return
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
        if piece and self._parser is not None and not self.transport.is_closing():
            self._feed(piece)
        if self._backlog:
            self._loop.call_soon(self._feed_next)
        elif not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        self._idle_since = None
        # What belongs to a body counts too, for this one time: the limit is far above it.
        self._num_header_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            why = error.__context__ or error
            if not isinstance(why, ApiError):
                why = ApiError(400, f"this is no valid HTTP request: {why}", code="bad_http")
            self._end(why)
            return
        if self._reads != "headers":
            self._num_header_bytes = 0
        elif self._num_header_bytes > self._limits.max_header_bytes:
            self._end(headers_too_large(self._limits.max_header_bytes, self._limits.max_headers))
            return
        if self._has_moved:
            self._arm_deadline()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as error:
                if not self._is_offer:
                    return
                # The parser leaves the body to the other protocol: read again, without the offer.
                self._is_offer = False
                head = head_without_offer(self._parser, self._url, self._headers)
                data = head + data[error.args[0] :]
                self._parser = new_parser(self)

    # -- what the parser calls ---------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self._pipeline) >= MAX_PIPELINED:
            message = f"more than {MAX_PIPELINED} requests wait on this connection"
            raise ApiError(400, message, code=TOO_MANY_PIPELINED)
        self._reads, self._has_moved = "headers", True
        self._num_named_bytes = 0
        self._url, self._headers, self._expects_continue = b"", [], False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_named_bytes += len(name) + len(value)
        is_long = self._num_named_bytes > self._limits.max_header_bytes
        if is_long or len(self._headers) >= self._limits.max_headers:
            raise headers_too_large(self._limits.max_header_bytes, self._limits.max_headers)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        # Nobody can be connected to here, whatever else is offered: that is an error of its own.
        self._is_offer = self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT"
        if self._is_offer:
            return
        self._reads, self._has_moved = "body", True
        self._num_discarded = self._num_piece_bytes = 0
        version, before = self._parser.get_http_version(), self._newest
        self._newest = cycle = HttpCycle(
            self._scopes.of_request(
                *(self._parser.get_method(), version, self._url, self._headers)
            ),
            self.transport,
            self.flow,
            self._server_state.default_headers,
            keep_alive=version != "1.0" and self._parser.should_keep_alive(),
            waits_for_continue=self._expects_continue,
            on_complete=self._on_complete,
        )
        if before is None or before.response_complete:
            self._start(cycle)
        else:
            self.flow.pause_reading()
            self._pipeline.append(cycle)

    def on_body(self, body: bytes) -> None:
        self._num_piece_bytes += len(body)
        if self._num_piece_bytes >= BODY_PIECE_BYTES:
            self._num_piece_bytes, self._has_moved = 0, True
        cycle = self._newest
        if cycle is not None and not cycle.response_complete:
            cycle.add_body(body)
            return
        self._num_discarded += len(body)
        if self._num_discarded > MAX_DISCARDED_BYTES:
            self.transport.close()

    def on_message_complete(self) -> None:
        if self._is_offer:
            return
        self._reads, self._has_moved = "nothing", True
        if self._newest is not None and not self._newest.response_complete:
            self._newest.end_body()

    def _start(self, cycle: HttpCycle) -> None:
        self._answering = cycle
        task = self._loop.create_task(cycle.run(surplus if self._is_surplus else self._app))
        tasks = self._server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)
