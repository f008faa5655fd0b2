"""Streams and the work behind them: what is written, and how they end with their client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.server.answer_wire import WIRE, AnswerWire
from octavo.server.drain import Drain
from octavo.server.errors import ApiError, ClientDisconnectedError
from octavo.server.streaming import Attachment, run_attached, stream_response


class Rounds:
    """Scripted rounds, one a turn of the loop."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.closed: list[BaseException | None] = []

    def begin(self) -> None:
        pass

    @property
    def is_over(self) -> bool:
        return not self._texts

    async def take(self, reader: Any = None) -> list[News]:
        await asyncio.sleep(0)
        text = self._texts.pop(0)
        if text == "broken":
            raise ApiError(500, "broken")
        return [(0, OutputDelta(index=0, text=text), not self._texts)]

    def close(self, error: BaseException | None) -> None:
        self.closed.append(error)


class Texts:
    """An event is its text."""

    is_brief = True

    def events(self, news: list[News]) -> bytes:
        return b"".join(delta.text.encode() for _, delta, _ in news)

    async def end(self) -> bytes:
        return b"end"

    def failure(self, error: Exception) -> bytes:
        return b"failed: %b" % str(error).encode()


class Wire:
    """A connection that notes what is written, with the parts of uvicorn's cycle around it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.cycle: Any = SimpleNamespace(
            transport=self,
            response_started=False,
            chunked_encoding=None,
            disconnected=False,
            flow=SimpleNamespace(write_paused=False),
        )
        exchange = SimpleNamespace(reason="")
        self.scope: Any = {
            "extensions": {WIRE: AnswerWire(self.cycle)},
            "state": {"exchange": exchange},
        }

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.cycle.response_started = self.cycle.chunked_encoding = True
            self.cycle.transport.write(b"HEAD ")
        else:
            end = b"" if message["more_body"] else b"0"
            self.cycle.transport.write(message["body"] + end)


async def stay() -> Any:
    await asyncio.Event().wait()


async def leave() -> Any:
    return {"type": "http.disconnect"}


async def test_a_stream_is_one_write_a_round_with_its_head_in_the_first_and_its_end_in_the_last():
    wire, rounds = Wire(), Rounds(["a", "b", "c"])
    response = await stream_response(rounds, Texts(), stay, Drain())
    await response(wire.scope, stay, wire.send)
    assert wire.writes == [b"HEAD 1\r\na\r\n", b"1\r\nb\r\n", b"cend0"]
    assert rounds.closed == [None]


async def test_a_stream_of_one_round_is_one_write():
    wire = Wire()
    response = await stream_response(Rounds(["a"]), Texts(), stay, Drain())
    await response(wire.scope, stay, wire.send)
    assert wire.writes == [b"HEAD aend0"]


async def test_a_stream_that_breaks_off_ends_with_its_error():
    wire, rounds = Wire(), Rounds(["a", "broken", "c"])
    response = await stream_response(rounds, Texts(), stay, Drain())
    await response(wire.scope, stay, wire.send)
    assert wire.writes[-1] == b"failed: broken0"
    assert isinstance(rounds.closed[0], ApiError)


async def test_a_client_that_leaves_before_the_first_event_ends_what_runs():
    rounds = Rounds(["", "", "", "", "a"])
    with pytest.raises(ClientDisconnectedError):
        await stream_response(rounds, Texts(), leave, Drain())
    assert len(rounds.closed) == 1


async def test_work_ends_when_the_drain_expires_and_says_so():
    drain = Drain()
    asyncio.get_running_loop().call_soon(drain.expired.set)
    with pytest.raises(ApiError, match="shutting down"):
        await run_attached(stay(), stay, drain)
    with pytest.raises(ApiError, match="shutting down"):
        await run_attached(stay(), stay, drain)


async def test_a_cancellation_from_elsewhere_stays_one():
    task = asyncio.ensure_future(run_attached(stay(), stay, Drain()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_ends_in_time_leaves_no_cancellation_behind():
    attachment = Attachment(stay, Drain())
    with attachment:
        await asyncio.sleep(0)
    attachment.end()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
