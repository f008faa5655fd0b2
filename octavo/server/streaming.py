"""Answers while the client is there: work tied to its connection, and server-sent events.

Called by the routes. Owns the rule that work stops when its client leaves or the server ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.engine.mailbox import News, Reader
from octavo.errors import OctavoError
from octavo.server.answer_wire import AnswerWire, wire_of
from octavo.server.drain import Drain, shutting_down
from octavo.server.errors import ClientDisconnectedError, error_body
from octavo.server.pieces import pieces_of, sliced

logger = logging.getLogger(__name__)

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's chats and completions."""
_STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)


class Rounds(Protocol):
    """What a call gains, round by round."""

    hang_up: Callable[[], None] | None
    """Called when the reader is given up: ends its connection."""

    def begin(self) -> None:
        """Hands the call to the engine; raises what the engine raises."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether `take` would wait for ever."""
        ...

    async def take(self, reader: Reader | None = None) -> list[News]:
        """Waits for news that `reader` does not take. Raises what ended the call."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Ends what still runs, because of `error` if there is one."""
        ...


class EventWriter(Protocol):
    """Makes server-sent events of what a call gains."""

    is_brief: bool
    """Whether the events of all rounds are bytes."""

    def events(self, news: list[News]) -> bytes | Iterator[bytes]:
        """Returns the events of one round, which may be none; in pieces if they may be long."""
        ...

    async def end(self) -> bytes:
        """Returns what follows the last round, to the end of the stream."""
        ...

    def failure(self, error: Exception) -> bytes:
        """Returns what ends a stream that fails after its first event."""
        ...


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

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        drain: Drain,
        media_type: str = "application/json",
    ) -> None:
        super().__init__(media_type=media_type)
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
    """Returns `data`, which has no lazy lists, as one server-sent event."""
    return b"data: %b\n\n" % _encode(data)


def failure_event(error: Exception) -> bytes:
    """Returns `error` as the event that ends a stream of a chat or a completion."""
    return event(error_body(error))


def event_pieces(data: Any) -> Iterator[bytes]:
    """Yields `data`, which may have lazy lists, as one server-sent event."""
    yield b"data: "
    yield from pieces_of(data)
    yield b"\n\n"


class Attachment:
    """Ties work to its client: what runs inside `with` is cancelled when the client leaves or the
    drain expires, and ClientDisconnectedError or ApiError (503) is raised in its place.

    May be entered several times, by one task at a time. `end` lets the client go.
    """

    def __init__(self, receive: Receive, drain: Drain, wire: AnswerWire | None = None) -> None:
        """The `wire` of the request tells that the client leaves; without it, `receive` does."""
        self._expired = drain.expired
        self._task: asyncio.Task[Any] | None = None
        self._num_cancelling = 0
        self._error: Exception | None = None
        self._wire = wire
        self._gone: asyncio.Future[None] | None = None
        if wire is not None:
            wire.watch(self._on_gone)
        else:
            self._gone = asyncio.ensure_future(_disconnected(receive))
            self._gone.add_done_callback(self._on_disconnected)
        self._expired.watch(self._on_expired)

    def end(self) -> None:
        if self._wire is not None:
            self._wire.watch(None)
        if self._gone is not None:
            self._gone.cancel()
        self._expired.unwatch(self._on_expired)

    def __enter__(self) -> Attachment:
        if self._error is not None:
            raise self._error
        self._task = task = asyncio.current_task()
        assert task is not None, "work is attached inside a task"
        self._num_cancelling = task.cancelling()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._error is None:
            return
        is_ours = task.uncancel() <= self._num_cancelling
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise self._error from error

    def _on_disconnected(self, gone: asyncio.Future[None]) -> None:
        if not gone.cancelled():
            self._on_gone()

    def _on_gone(self) -> None:
        self._stop(ClientDisconnectedError("the client closed the connection"))

    def _on_expired(self) -> None:
        self._stop(shutting_down())

    def _stop(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            if self._task is not None:
                self._task.cancel()


async def run_attached(
    work: Coroutine[Any, Any, T], receive: Receive, drain: Drain, wire: AnswerWire | None = None
) -> T:
    """Returns what `work` returns; cancels it when the client leaves or the drain expires.

    Raises ClientDisconnectedError, or ApiError (503) when the server ends first.
    """
    attachment = Attachment(receive, drain, wire)
    try:
        with attachment:
            return await work
    finally:
        attachment.end()
        work.close()  # It may not have begun.


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: `first`, those of all later rounds, and the writer's end; an error is an
    event too.

    A round is one write of the socket, and the last one holds the end of the answer as well. Most
    rounds are written as their news come: no task wakes up for them.
    """

    def __init__(
        self,
        first: bytes | Iterator[bytes],
        rounds: Rounds,
        writer: EventWriter,
        attachment: Attachment,
    ) -> None:
        # Not Response's own __init__: it would look for a body and its length.
        self.status_code, self.background = 200, None
        self.raw_headers = list(_STREAM_HEADERS)
        self._first = first
        self._rounds = rounds
        self._writer = writer
        self._attachment = attachment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = wire_of(scope)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        failure: Exception | None = None
        try:
            if wire is not None:
                wire.hold_head()
                self._rounds.hang_up = wire.hang_up
            await send(start)
            with self._attachment:
                last = await self._send_all(send, wire)
        except ClientDisconnectedError:
            return
        except Exception as error:
            failure = error
            # The status line is out: whatever it is, the client can only be told in the stream.
            if not isinstance(error, OctavoError):
                logger.error("a stream failed", exc_info=error)
            told, exchange = error_body(error)["error"], scope["state"]["exchange"]
            exchange.reason, exchange.code = told["message"], told["code"] or ""
            last = self._writer.failure(error)
        finally:
            self._rounds.close(failure)
            self._attachment.end()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_all(self, send: Send, wire: AnswerWire | None) -> bytes:
        """Returns the last piece, which is still to be sent."""
        rounds, events = self._rounds, self._writer.events
        if wire is not None and not wire.is_open:
            wire = None
        reader = None if wire is None or not self._writer.is_brief else self._write_now(wire)
        piece = self._first
        while True:
            if not isinstance(piece, bytes):
                async for part in sliced(piece):
                    await _put(part, send, wire)
                piece = b""
            if rounds.is_over:
                return piece + await self._writer.end()
            await _put(piece, send, wire)
            piece = events(await rounds.take(reader))

    def _write_now(self, wire: AnswerWire) -> Reader:
        """Returns what writes rounds that are not the last, while nobody must be waited for."""
        rounds, events = self._rounds, self._writer.events

        def write(news: list[News]) -> bool:
            # The end of a call comes with that of a request.
            if (news[-1][2] and rounds.is_over) or wire.is_paused:
                return False
            piece = events(news)
            assert isinstance(piece, bytes), "the writer is brief"
            if piece:
                wire.write(piece)
            return True

        return write


async def _put(piece: bytes, send: Send, wire: AnswerWire | None) -> None:
    if not piece:
        return
    if wire is None:
        await _send(send, piece)
        return
    if wire.is_paused:
        await wire.drained()
    wire.write(piece)


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _begun(events: bytes | Iterator[bytes]) -> bytes | Iterator[bytes]:
    """Returns the events of a round; b"" if there are none."""
    if isinstance(events, bytes):
        return events
    piece = next(events, b"")
    return itertools.chain((piece,), events) if piece else b""


async def stream_response(
    rounds: Rounds,
    writer: EventWriter,
    receive: Receive,
    drain: Drain,
    wire: AnswerWire | None = None,
) -> Response:
    """Returns the stream once its first event is there, so that early errors keep their status."""
    attachment = Attachment(receive, drain, wire)
    try:
        with attachment:
            rounds.begin()
            first: bytes | Iterator[bytes] = b""
            while not first and not rounds.is_over:
                first = _begun(writer.events(await rounds.take()))
    except BaseException as error:
        rounds.close(error)
        attachment.end()
        raise
    return EventStream(first, rounds, writer, attachment)
