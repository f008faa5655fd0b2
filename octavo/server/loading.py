"""What the ports of a server answer while its model loads: 503 to everybody, at once.

Used by the `serve` command from the moment its ports listen until the server itself answers; a port
that listens and says nothing would hold every probe to its limit. Knows no routes: `/health` is 503
too, for many take its 200, as vLLM's, for a server that can be asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from typing import Any, cast

from octavo.config import ServerConfig
from octavo.server.errors import ApiError, error_body

logger = logging.getLogger(__name__)

_ACCEPTED_AT_ONCE = 64
_HEAD_BYTES = 64 * 1024
_REQUEST_SECONDS = 10.0
"""What a client gets to send the head of its request."""
_LINGER_SECONDS = 1.0
"""What a client gets to read the answer before its connection is closed. Closed at once, one that
still sends a body would see a reset and not the answer."""


class LoadingPorts:
    """Answers on listening sockets until it is closed; the sockets stay open."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises OSError if a certificate has gone since it was checked."""
        self._context: ssl.SSLContext | None = None
        if config.ssl_certfile is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        self._listening: list[socket.socket] = []
        self._handshakes: set[asyncio.Future[Any]] = set()

    def open(self, api: socket.socket, metrics: socket.socket | None) -> None:
        """Begins to answer on both ports, the first in HTTPS where the server will."""
        self._listen(api, self._context)
        if metrics is not None:
            self._listen(metrics, None)

    def _listen(self, bound: socket.socket, context: ssl.SSLContext | None) -> None:
        # A copy: the descriptor itself is the server's, which may watch it before this one ends.
        copy = bound.dup()
        copy.setblocking(False)
        self._listening.append(copy)
        asyncio.get_running_loop().add_reader(copy.fileno(), self._accept, copy, context)

    def _accept(self, listening: socket.socket, context: ssl.SSLContext | None) -> None:
        # Not `create_server`: asyncio's drops what it has accepted just before it is closed.
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except OSError:  # nobody waits, or the client has left already
                return
            connection.setblocking(False)
            taking = loop.connect_accepted_socket(_Refusal, connection, ssl=context)
            task = asyncio.ensure_future(taking)
            self._handshakes.add(task)
            task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Future[Any]) -> None:
        self._handshakes.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("a connection was not taken: %s", task.exception())

    def close(self) -> None:
        """Accepts no more; what was accepted is still answered. May be called again."""
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening.fileno())
            listening.close()
        self._listening.clear()


class _Refusal(asyncio.Protocol):
    """One connection: the head of a request is read, the answer written, the rest thrown away."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._is_answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # which uvloop's do not derive from
        loop = asyncio.get_running_loop()
        self._limit = loop.call_later(_REQUEST_SECONDS, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._is_answered:
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self._is_answered = True
            self._limit.cancel()
            self._transport.write(_answer(is_head=self._head.startswith(b"HEAD ")))
            loop = asyncio.get_running_loop()
            self._limit = loop.call_later(_LINGER_SECONDS, self._transport.close)
        elif len(self._head) > _HEAD_BYTES:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()


def _answer(is_head: bool) -> bytes:
    headers = {"Connection": "close", "Retry-After": "1"}
    error = ApiError(503, "the model loads", code="not_ready", headers=headers)
    body = json.dumps(error_body(error)).encode()
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if is_head else body)
