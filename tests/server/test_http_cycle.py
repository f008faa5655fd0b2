"""One request and its answer: what goes to the connection, and what an app may not do."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from octavo.config import ServerConfig
from octavo.server.app import create_app
from octavo.server.http_cycle import HttpCycle
from tests.server.cycles import Transport, new_cycle
from tests.server.fake_engine import FakeEngine


def head_of(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body_of(body: bytes, more_body: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more_body}


async def answered(*messages: dict[str, Any], method: str = "POST") -> tuple[bytes, Transport]:
    """Returns what an app that sends these messages has its client told."""
    transport = Transport()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    await new_cycle(transport, {"method": method}).run(app)
    return b"".join(transport.writes), transport


async def test_an_answer_of_known_length_is_written_as_it_is():
    told, transport = await answered(head_of((b"Content-Length", b"3")), body_of(b"abc"))
    assert told == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc"
    assert not transport.is_closed


async def test_an_answer_of_unknown_length_is_written_in_chunks():
    pieces = [body_of(b"a" * 1100, True), body_of(b"", True), body_of(b"c")]
    told, _ = await answered(head_of(status=201), *pieces)
    start = b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n44c\r\n"
    assert told == start + b"a" * 1100 + b"\r\n1\r\nc\r\n0\r\n\r\n"


async def test_an_answer_of_unknown_length_ends_with_the_connection_for_http_1_0():
    transport = Transport()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in (head_of(), body_of(b"ab", True), body_of(b"", True), body_of(b"c")):
            await send(message)

    cycle = new_cycle(transport, {"method": "GET", "http_version": "1.0"})
    cycle.keep_alive = False
    await cycle.run(app)
    told = b"".join(transport.writes)
    assert told == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"
    assert transport.is_closed


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_an_answer_without_a_body_has_none(method: str, status: int):
    told, _ = await answered(head_of(status=status), body_of(b""), method=method)
    assert told.endswith(b"\r\n\r\n")
    assert b"chunked" not in told


async def test_a_head_keeps_its_length_where_only_it_was_asked_for():
    length = head_of((b"content-length", b"3"))
    told, transport = await answered(length, body_of(b"abc"), method="HEAD")
    assert told == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"
    assert not transport.is_closed


async def test_a_connection_that_an_answer_closes_is_closed_behind_it():
    told, transport = await answered(head_of((b"connection", b"a, Close")), body_of(b""))
    assert told.count(b"onnection") == 1
    assert transport.is_closed


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"a\x00b", b"a\x7f"])
async def test_a_header_cannot_hold_another(value: bytes):
    told, transport = await answered(head_of((b"x-name", value)), body_of(b""))
    assert b"x-name" not in told
    assert transport.is_closed


@pytest.mark.parametrize(
    "messages",
    [
        [body_of(b"a")],
        [],
        [head_of((b"content-length", b"2")), body_of(b"a")],
        [head_of((b"content-length", b"2")), body_of(b"abc")],
        [head_of(), head_of()],
        [head_of(), body_of(b"a", True)],
        [head_of(), body_of(b"a"), body_of(b"a")],
    ],
)
async def test_an_app_that_errs_does_not_leave_its_client_waiting(messages: list[dict[str, Any]]):
    told, transport = await answered(*messages)
    assert transport.is_closed
    assert told.startswith(b"HTTP/1.1 500 " if not messages or len(messages) == 1 else b"HTTP/1.1")


async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_once():
    transport = Transport()
    cycle = HttpCycle(
        {"method": "POST"},
        transport,
        transport.flow,
        [],
        keep_alive=True,
        waits_for_continue=True,
        on_complete=lambda: None,
    )
    receiving = asyncio.ensure_future(cycle.receive())
    await asyncio.sleep(0)
    cycle.add_body(b"a")
    assert await receiving == {"type": "http.request", "body": b"a", "more_body": True}
    cycle.add_body(b"b")
    cycle.end_body()
    assert await cycle.receive() == {"type": "http.request", "body": b"b", "more_body": False}
    assert transport.writes == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    gone: list[bool] = []
    cycle.watch(lambda: gone.append(True))
    receiving = asyncio.ensure_future(cycle.receive())
    await asyncio.sleep(0)
    cycle.leave()
    assert await receiving == {"type": "http.disconnect"}
    assert gone == [True]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_leaves_nothing_to_the_collector(path: str, stream: bool):
    engine = FakeEngine()
    app = create_app(engine, ServerConfig(log_level="warning"))
    asked = (
        {"prompt": "x"} if "chat" not in path else {"messages": [{"role": "user", "content": "x"}]}
    )
    scope = {"path": path, "headers": [(b"content-type", b"application/json")], "query_string": b""}
    content = json.dumps(asked | {"stream": stream}).encode()

    async def ask() -> None:
        transport = Transport()
        await asyncio.create_task(new_cycle(transport, dict(scope), content).run(app))
        assert transport.writes[0].startswith(b"HTTP/1.1 200 ")

    await ask()  # what is made once is made
    gc.collect()
    gc.disable()
    try:
        await ask()
        await asyncio.sleep(0)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = {type(one).__name__ for one in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not kinds & {"HttpCycle", "Exchange", "Request", "Call", "Mailbox"}, kinds
