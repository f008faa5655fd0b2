"""A stream's bytes are the same by the short way, from the engine's news to the connection, and by
the framework's."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.server.app import create_app
from tests.server.cycles import Transport, new_cycle
from tests.server.fake_engine import FakeEngine

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


class Client:
    """One client of an app, without a socket: with a wire, or without one."""

    def __init__(self, pauses: frozenset[int], has_wire: bool) -> None:
        """The connection is full at some of its writes."""
        self._transport = Transport(pauses)
        self._has_wire = has_wire
        self.num_sent = 0

    async def ask(self, app: Any, path: str, body: dict[str, Any]) -> bytes:
        """Returns the body of the answer."""
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"one")]
        scope = {"path": path, "headers": headers, "query_string": b""}
        cycle = new_cycle(self._transport, scope, json.dumps(body).encode())

        async def send(message: Any) -> None:
            self.num_sent += 1
            await cycle.send(message)

        async def counted(scope: Any, receive: Any, _: Any) -> None:
            await app(scope | ({} if self._has_wire else {"extensions": {}}), receive, send)

        await asyncio.wait_for(cycle.run(counted), 20)
        head, _, told = b"".join(self._transport.writes).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        return unchunked(told)


def unchunked(data: bytes) -> bytes:
    """Returns what chunks hold; there must be nothing behind the last."""
    whole = b""
    while True:
        size, _, rest = data.partition(b"\r\n")
        count = int(size, 16)
        if not count:
            assert rest == b"\r\n"
            return whole
        assert rest[count : count + 2] == b"\r\n"
        whole, data = whole + rest[:count], rest[count + 2 :]


def texts_of(told: bytes) -> dict[int, str]:
    """Returns what the events of a chat or a completion say, by sequence."""
    found: dict[int, str] = {}
    for event in re.findall(rb"data: (\{.*\})\n", told):
        for choice in json.loads(event).get("choices", ()):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + text
    return found


SPOKEN = st.characters(min_codepoint=8, exclude_categories=("Cs",))
"""Tokens of the engine that are no special ones."""
ENGINE = FakeEngine()
APP = create_app(ENGINE, ServerConfig(log_level="warning"))


async def both_ways(
    path: str, body: dict[str, Any], answer: str, pauses: frozenset[int] = frozenset()
) -> list[bytes]:
    """Returns what a client is told by the short way and by the general one."""
    ENGINE.answer = answer
    short = Client(pauses, has_wire=True)
    told = [await short.ask(APP, path, body)]
    assert short.num_sent == 2, "pieces between head and end pass the layers by"
    told.append(await Client(pauses, has_wire=False).ask(APP, path, body))
    return [re.sub(rb'"created":\d+', b'"created":0', one) for one in told]


def body_for(path: str, n: int, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"stream": True, "max_tokens": 400} | more
    if path == TEXT:
        return asked | {"prompt": "x", "n": n}
    asked |= {"messages": [{"role": "user", "content": "x"}], "model": "fake"}
    return asked if path == MESSAGES else asked | {"n": n}


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES])
@settings(max_examples=12, deadline=None)
@given(
    answer=st.text(SPOKEN, min_size=1, max_size=30),
    n=st.integers(1, 3),
    has_usage=st.booleans(),
)
def test_the_bytes_are_those_of_the_framework(
    path: str, answer: str, n: int, has_usage: bool
) -> None:
    more = {"stream_options": {"include_usage": True}} if has_usage and path != MESSAGES else {}
    short, general = asyncio.run(both_ways(path, body_for(path, n, **more), answer))
    assert short == general


@pytest.mark.parametrize("path", [CHAT, TEXT])
@settings(max_examples=12, deadline=None)
@given(
    answer=st.text(SPOKEN, min_size=1, max_size=60),
    n=st.integers(1, 3),
    pauses=st.frozensets(st.integers(1, 60)),
)
def test_a_connection_that_is_full_at_times_gets_the_same_text(
    path: str, answer: str, n: int, pauses: frozenset[int]
) -> None:
    short, general = asyncio.run(both_ways(path, body_for(path, n), answer, pauses))
    assert texts_of(short) == texts_of(general) == dict.fromkeys(range(n), answer)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_streams_that_tell_of_each_token_take_the_general_way_of_writing_events(
    path: str,
) -> None:
    logprobs = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    short, general = await both_ways(path, body_for(path, 1, **logprobs), 'a"\n')
    assert short == general
    assert short.count(b'"logprobs":{') == 3
