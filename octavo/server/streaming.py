"""Answers while the client is there: work tied to its connection, and server-sent events.

Called by the routes. Owns the rule that work stops when its client leaves or the server ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.server.drain import Drain, shutting_down
from octavo.server.errors import ClientDisconnectedError, error_body
from octavo.server.pieces import pieces_of, sliced

logger = logging.getLogger(__name__)

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]
"""Server-sent events, one or several in each piece."""

_encode = msgspec.json.Encoder().encode


def json_response(body: dict[str, Any]) -> Response:
    """Returns `body`, which has no lazy lists, as JSON."""
    return Response(_encode(body), media_type="application/json")


async def long_response(body: dict[str, Any], drain: Drain) -> Response:
    """Returns `body`, which may have lazy lists, as JSON that is sent while it is written."""
    pieces = sliced(pieces_of(body))
    first = await anext(pieces)
    try:
        second = await anext(pieces)
    except StopAsyncIteration:
        return Response(first, media_type="application/json")
    return PiecesResponse(first + second, pieces, drain)


class PiecesResponse(Response):
    """An answer of unknown length: `first`, then all of `rest`."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], drain: Drain) -> None:
        super().__init__(media_type="application/json")
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await run_attached(self._send_all(send), receive, self._drain)
        except ClientDisconnectedError:
            return
        finally:
            await self._rest.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await _send(send, self._first)
        async for piece in self._rest:
            await _send(send, piece)


def event(data: Any) -> bytes:
    """Returns `data` as one server-sent event."""
    return b"".join(event_pieces(data))


def event_pieces(data: Any) -> Iterator[bytes]:
    """Yields `data`, which may have lazy lists, as one server-sent event."""
    yield b"data: "
    yield from pieces_of(data)
    yield b"\n\n"


async def run_attached(work: Coroutine[Any, Any, T], receive: Receive, drain: Drain) -> T:
    """Returns what `work` returns; cancels it when the client leaves or the drain expires.

    Raises ClientDisconnectedError, or ApiError (503) when the server ends first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    expired = asyncio.ensure_future(drain.expired.wait())
    waits: list[asyncio.Future[Any]] = [task, gone, expired]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnectedError("the client closed the connection")
        raise shutting_down()
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: `first`, then all of `rest`, then [DONE]; an error is an event too."""

    def __init__(self, first: bytes, rest: Events, drain: Drain) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await run_attached(self._send_all(send), receive, self._drain)
        except ClientDisconnectedError:
            return
        except Exception as error:
            # The status line is out: whatever it is, the client can only be told in the stream.
            if not isinstance(error, OctavoError):
                logger.error("a stream failed", exc_info=error)
            told = error_body(error)
            scope["state"]["exchange"].reason = told["error"]["message"]
            await _send(send, event(told))
        finally:
            await self._rest.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await _send(send, self._first)
        async for events in self._rest:
            await _send(send, events)
        await _send(send, b"data: [DONE]\n\n")


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def stream_response(events: Events, receive: Receive, drain: Drain) -> Response:
    """Returns the stream once its first event is there, so that early errors keep their status."""
    try:
        first = await run_attached(_next(events), receive, drain)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, drain)


async def _next(events: Events) -> bytes:
    return await anext(events)
