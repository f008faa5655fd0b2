"""Bodies come in within bounds; long ones are parsed in a process of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from array import array
from typing import Any

import httpx
import pytest

from octavo.engine.chat_template import ChatRenderer
from octavo.errors import OverloadedError, RequestError
from octavo.server.body import is_quick
from octavo.server.errors import ApiError
from octavo.server.limits import TOTAL_BODIES, BodyRoom, default_body_bytes
from octavo.server.parser import ParserProcess
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.decoding import parse_body
from octavo.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

RENDERER = ChatRenderer("{% for m in messages %}{{ m.content }}|{% endfor %}", {}, ("<s>",))
TEXT = "/v1/completions"


def body_of(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("model", "content", "expected"),
    [
        (CompletionRequest, body_of(prompt="x" * 900_000), True),
        (CompletionRequest, body_of(prompt="x" * 1_100_000), False),
        (CompletionRequest, body_of(prompt=[1] * 30_000), True),
        (CompletionRequest, body_of(prompt=[1] * 40_000), False),
        (ChatRequest, body_of(messages=[{"role": "user", "content": "x" * 60_000}]), True),
        (ChatRequest, body_of(messages=[{"role": "user", "content": "x" * 70_000}]), False),
        (ChatRequest, body_of(messages=[{"role": "user", "content": "x"}] * 900), False),
        (TokenizeRequest, body_of(messages=[{"role": "user", "content": "x" * 70_000}]), False),
        (DetokenizeRequest, b"[" * 40_000, False),
    ],
)
def test_bodies_that_hold_many_values_are_not_parsed_in_the_loop(model, content, expected) -> None:
    assert is_quick(content, model) is expected


async def test_the_parser_returns_what_the_loop_would_have_made() -> None:
    parser = ParserProcess(lambda: RENDERER)
    try:
        ids = [list(range(500)), [7] * 90_000]
        found = await parser.parse(CompletionRequest, body_of(prompt=ids, max_tokens=3))
        assert found == parse_body(CompletionRequest, body_of(prompt=ids, max_tokens=3), None)
        assert [list(one) for one in found.prompts()] == ids
        assert all(isinstance(one, array) for one in found.prompts())
        messages = [{"role": "user", "content": f"{i}"} for i in range(2000)]
        messages.append({"role": "assistant", "content": "<s>"})
        chat = await parser.parse(ChatRequest, body_of(messages=messages, echo=True))
        assert chat.rendered is not None
        assert chat.rendered.shown == "".join(f"{i}|" for i in range(2000)) + "<s>|"
        assert chat.rendered.literals == ("<s>",)
        assert len(chat.messages) == 1
        assert chat.echoed_text() == "<s>"
    finally:
        await parser.close()


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"[" * 100_000, None),
        (b"{" * 100_000, None),
        (b'{"prompt": ' + b"1" * 1_000_000 + b"}", None),
        (body_of(prompt=[1, "a"]), "prompt"),
        (body_of(prompt=[2**70]), "prompt"),
        (body_of(prompt=[[1]] * 1025), "prompt"),
        (body_of(prompt="x", allowed_token_ids=[1] * 70_000), "allowed_token_ids"),
        (body_of(prompt="x", logit_bias={str(i): 1 for i in range(70_000)}), "logit_bias"),
        (body_of(prompt="x", bad_words=["a"] * 2000), "bad_words"),
        (body_of(**{f"field{i}": 1 for i in range(50_000)}), "field0"),
    ],
)
async def test_what_the_parser_refuses_names_its_field_as_ever(content: bytes, param: str) -> None:
    parser = ParserProcess(lambda: None)
    try:
        with pytest.raises(RequestError) as refused:
            await parser.parse(CompletionRequest, content)
        assert refused.value.param == param
    finally:
        await parser.close()


async def test_a_parser_that_is_killed_harms_one_body_and_is_started_anew() -> None:
    parser = ParserProcess(lambda: None)
    try:
        assert (await parser.parse(CompletionRequest, body_of(prompt=[5]))).prompts()
        assert parser._process is not None
        os.kill(parser._process.pid, signal.SIGSTOP)
        harmed = asyncio.ensure_future(parser.parse(CompletionRequest, body_of(prompt=[6])))
        waits = asyncio.ensure_future(parser.parse(CompletionRequest, body_of(prompt=[7])))
        await asyncio.sleep(0.05)
        parser._process.kill()
        with pytest.raises(OverloadedError):
            await harmed
        assert list((await waits).prompts()[0]) == [7]
    finally:
        await parser.close()


async def test_a_client_that_leaves_leaves_no_answer_to_the_next_body() -> None:
    parser = ParserProcess(lambda: None)
    try:
        first = asyncio.ensure_future(parser.parse(CompletionRequest, body_of(prompt=[5])))
        second = asyncio.ensure_future(parser.parse(CompletionRequest, body_of(prompt=[6])))
        await asyncio.sleep(0.01)
        first.cancel()
        assert list((await second).prompts()[0]) == [6]
        assert first.cancelled()
    finally:
        await parser.close()


def test_a_parser_ends_with_the_process_that_started_it() -> None:
    program = (
        "import asyncio, os\n"
        "from octavo.server.parser import ParserProcess\n"
        "from octavo.server.protocol.completions import CompletionRequest\n"
        "async def main():\n"
        "    parser = ParserProcess(lambda: None)\n"
        "    await parser.parse(CompletionRequest, b'{\"prompt\": [5]}')\n"
        "    print(parser._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    pid = int(ended.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _lives(pid):
        time.sleep(0.05)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_parser_loads_no_http_stack() -> None:
    program = "import octavo.server.parser, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "fastapi", "starlette", "uvicorn", "tokenizers"}


def test_the_largest_body_follows_from_the_context() -> None:
    assert default_body_bytes(2048) == 2**20 + 2048 * 32
    assert default_body_bytes(10**6) == 4 * 2**20


def test_bodies_that_are_received_at_once_share_a_room() -> None:
    room = BodyRoom(100)
    for _ in range(TOTAL_BODIES):
        room.take(100)
    with pytest.raises(OverloadedError):
        room.take(1)
    room.give_back(100)
    room.take(1)
    with pytest.raises(ApiError) as refused:
        room.check(101)
    assert refused.value.status == 413


def test_a_full_room_is_a_503_that_says_when_to_come_again(start_server) -> None:
    server = start_server(max_body_bytes=30_000)
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 30000\r\n\r\n"
    held = [socket.create_connection((host, int(port))) for _ in range(TOTAL_BODIES + 1)]
    try:
        for one in held:
            one.sendall(head + b" " * 29_999)
        answers = b""
        for one in held:
            one.settimeout(2)
            try:
                answers += one.recv(65536)
            except TimeoutError:
                continue
        assert answers.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in answers.lower()
    finally:
        for one in held:
            one.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        answer = httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 1})
        if answer.status_code == 200:
            return
        time.sleep(0.1)
    pytest.fail("the room of those that left is not given back")


def test_an_early_413_lets_the_client_read_it(start_server) -> None:
    server = start_server(max_body_bytes=1000)
    for content in (b"x" * 3_000_000, (b"x" * 1000 for _ in range(3000))):
        headers = {"content-type": "application/json"}
        answer = httpx.post(server.url + TEXT, content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_more_ids_than_the_context_holds_are_not_spelt(start_server) -> None:
    server = start_server()
    answer = httpx.post(server.url + "/detokenize", json={"tokens": [97] * 513})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
