"""Streams and the work behind them: what is written, and how they end with their client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.server.drain import Drain
from octavo.server.errors import ApiError, ClientDisconnectedError
from octavo.server.streaming import Attachment, run_attached, stream_response
from tests.server.cycles import Transport, new_cycle


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


HEAD = (
    b"HTTP/1.1 200 OK\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


async def written(response: Response) -> list[bytes]:
    """Returns what is written to the connection of a client that reads an answer to its end."""
    transport = Transport()
    cycle = new_cycle(transport)
    cycle.scope["state"] = {"exchange": SimpleNamespace(reason="")}
    await cycle.run(response)
    return transport.writes


async def stay() -> Any:
    await asyncio.Event().wait()


async def leave() -> Any:
    return {"type": "http.disconnect"}


async def test_a_stream_is_one_write_a_round_with_its_head_in_the_first_and_its_end_in_the_last():
    rounds = Rounds(["a", "b", "c"])
    response = await stream_response(rounds, Texts(), stay, Drain())
    assert await written(response) == [
        HEAD + b"1\r\na\r\n",
        b"1\r\nb\r\n",
        b"4\r\ncend\r\n" + END,
    ]
    assert rounds.closed == [None]


async def test_a_stream_of_one_round_is_one_write():
    response = await stream_response(Rounds(["a"]), Texts(), stay, Drain())
    assert await written(response) == [HEAD + b"4\r\naend\r\n" + END]


async def test_a_stream_that_breaks_off_ends_with_its_error():
    rounds = Rounds(["a", "broken", "c"])
    response = await stream_response(rounds, Texts(), stay, Drain())
    assert (await written(response))[-1] == b"e\r\nfailed: broken\r\n" + END
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
