"""One request on a connection, and its answer: what the app receives and sends.

Made by `http_protocol` when a request's headers are complete, and told by it what comes. Never
reads a socket, and keeps of a body what the app has not received.

    headers -> body, piece by piece -> head -> pieces, by `send` or the short way -> complete
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl

from octavo.server.answer_wire import WIRE

logger = logging.getLogger(__name__)

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_NO_HEADER_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NUM_SIZES = 1024
_SIZES = tuple(b"%x\r\n" % size for size in range(_NUM_SIZES))
"""How pieces begin of so many bytes: nearly all are short."""
_LAST_CHUNK = b"0\r\n\r\n"


class HttpCycle:
    """The request's scope, `receive` and `send`, as ASGI has them, and the AnswerWire in it."""

    def __init__(
        self,
        scope: Scope,
        transport: asyncio.Transport,
        flow: FlowControl,
        default_headers: Iterable[tuple[bytes, bytes]],
        *,
        keep_alive: bool,
        waits_for_continue: bool,
        on_complete: Callable[[], None],
    ) -> None:
        """`on_complete` is called when the answer is written to its end."""
        self.scope = scope
        self.transport = transport
        self.flow = flow
        self.keep_alive = keep_alive
        """Whether another request may follow on the connection."""
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self._default_headers = default_headers
        self._waits_for_continue = waits_for_continue
        self._on_complete = on_complete
        self._on_gone: Callable[[], None] | None = None
        self._body = bytearray()
        self._has_more = True
        self._has_news = False
        self._news: asyncio.Event | None = None
        """Made when somebody waits: nearly all bodies are there when they are asked for."""
        self._is_chunked = False
        self._ends_by_close = False
        self._num_left = 0
        """Bytes of an answer of known length that are still to come."""
        self._holds_head = False
        self._head = b""
        scope["extensions"] = {WIRE: self}

    # -- what the connection tells ------------------------------------------------------------

    def add_body(self, piece: bytes) -> None:
        self._body += piece
        if len(self._body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self._tell()

    def end_body(self) -> None:
        self._has_more = False
        self._tell()

    def leave(self) -> None:
        """The client is gone."""
        if not self.response_complete:
            self.disconnected = True
        self._tell()
        if self.disconnected and self._on_gone is not None:
            self._on_gone()

    def _tell(self) -> None:
        self._has_news = True
        if self._news is not None:
            self._news.set()

    # -- the app -----------------------------------------------------------------------------

    async def run(self, app: ASGIApp) -> None:
        """Has the app answer; whatever it does, the client is not left waiting."""
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            # The edge of the process: the app answers its own errors.
            logger.error("a request failed outside of the app", exc_info=error)
            await self._give_up()
        else:
            if not self.response_complete and not self.disconnected:
                logger.error("a request was not answered to its end")
                await self._give_up()
        finally:
            # Each refers to the other: else both would stay until a collection.
            self.scope["extensions"].clear()

    async def _give_up(self) -> None:
        if self.response_started:
            self._write(b"")
            self.transport.close()
            return
        body = b"Internal Server Error"
        headers = (
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        )
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def receive(self) -> Message:
        """Returns what of the body has come, or that the client is gone."""
        if self._waits_for_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waits_for_continue = False
        if not (self.disconnected or self.response_complete):
            self.flow.resume_reading()
            if not self._has_news:
                if self._news is None:
                    self._news = asyncio.Event()
                self._news.clear()
                await self._news.wait()
            self._has_news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self._has_more}

    async def send(self, message: Message) -> None:
        """Sends the head of the answer, or a piece of its body. Raises RuntimeError for what does
        not follow."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        wanted = "http.response.body" if self.response_started else "http.response.start"
        if self.response_complete or message["type"] != wanted:
            raise RuntimeError(f"an answer does not go on with {message['type']!r}")
        if self.response_started:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._send_head(message["status"], message.get("headers", ()))

    def _send_head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self._waits_for_continue = False
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        has_length = is_chunked = says_close = False
        for name, value in (*self._default_headers, *headers):
            name = name.lower()
            if name == b"content-length":
                self._num_left, has_length = int(value), True
            elif name == b"transfer-encoding":
                is_chunked = value.lower() == b"chunked"
            elif name == b"connection" and b"close" in _tokens(value):
                self.keep_alive, says_close = False, True
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive and not says_close:
            lines.append(b"connection: close\r\n")
        is_bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        has_end = has_length or is_chunked or is_bodiless
        self._ends_by_close = not has_end and self.scope["http_version"] == "1.0"
        if not (has_end or self._ends_by_close):
            lines.append(b"transfer-encoding: chunked\r\n")
            is_chunked = True
        self._is_chunked = is_chunked
        if is_chunked:
            self._num_left = 0
        num_lines = len(lines)
        lines.append(b"\r\n")
        head = b"".join(lines)
        is_odd = _NO_HEADER_TEXT.search(head) or head.count(b"\r") != head.count(b"\r\n")
        if is_odd or head.count(b"\n") != num_lines + 1:
            raise RuntimeError("a header holds a control character")
        if self._holds_head:
            self._head = head
        else:
            self.transport.write(head)

    def _send_body(self, body: bytes, has_more: bool) -> None:
        if self.scope["method"] == "HEAD":
            body, self._num_left = b"", 0
        elif self._is_chunked:
            body = _chunk(body) if body else b""
            if not has_more:
                body += _LAST_CHUNK
        elif not self._ends_by_close:
            self._num_left -= len(body)
            if self._num_left < 0:
                raise RuntimeError("an answer is longer than its Content-Length")
        self._write(body)
        if has_more:
            return
        if self._num_left:
            raise RuntimeError("an answer is shorter than its Content-Length")
        self.response_complete = True
        self._tell()
        if not self.keep_alive:
            self.transport.close()
        self._on_complete()

    def _write(self, data: bytes) -> None:
        """Writes what follows the head, with it if that was held."""
        if self._head:
            self.transport.writelines((self._head, data))
            self._head = b""
        elif data:
            self.transport.write(data)

    # -- the short way -----------------------------------------------------------------------

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """As AnswerWire's."""
        self._on_gone = on_gone
        if on_gone is not None:
            self.flow.resume_reading()  # Else nobody would see it leave.
            if self.disconnected:
                on_gone()

    @property
    def is_open(self) -> bool:
        """As AnswerWire's."""
        return self.response_started and self._is_chunked

    def hold_head(self) -> None:
        """As AnswerWire's."""
        self._holds_head = True

    @property
    def is_paused(self) -> bool:
        """As AnswerWire's."""
        return self.flow.write_paused and not self.disconnected

    async def drained(self) -> None:
        await self.flow.drain()

    def write(self, piece: bytes) -> None:
        """As AnswerWire's."""
        if self.disconnected:
            return
        # As `_write(_chunk(piece))`: nearly all that is ever written passes here.
        num_bytes = len(piece)
        size = _SIZES[num_bytes] if num_bytes < _NUM_SIZES else b"%x\r\n" % num_bytes
        data = b"".join((size, piece, b"\r\n"))
        if self._head:
            self._write(data)
        else:
            self.transport.write(data)

    def hang_up(self) -> None:
        """As AnswerWire's."""
        self.transport.abort()


def _chunk(piece: bytes) -> bytes:
    num_bytes = len(piece)
    size = _SIZES[num_bytes] if num_bytes < _NUM_SIZES else b"%x\r\n" % num_bytes
    return b"".join((size, piece, b"\r\n"))


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().lower() for token in value.split(b",")]
