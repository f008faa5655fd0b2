"""One connection cannot take more than its share: time, headers, requests before their turn."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from octavo.config import ServerConfig
from octavo.server.event_loop import new_event_loop
from octavo.server.http_protocol import MAX_PIPELINED, ConnectionLimits
from octavo.server.serve import Server, bind
from tests.server.fake_engine import FakeEngine

LIMITS = ConnectionLimits(
    header_seconds=0.5,
    body_seconds=0.5,
    idle_seconds=0.5,
    unread_seconds=0.5,
    max_header_bytes=4096,
    max_headers=20,
    max_connections=4,
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
NUM_LARGE = 12
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@dataclass
class Served:
    port: int
    engine: FakeEngine


@pytest.fixture(scope="module")
def port(server: Served) -> int:
    return server.port


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server with a fake engine and short limits, on the loop that `serve` uses."""
    started: concurrent.futures.Future[Server] = concurrent.futures.Future()
    bound = bind(ServerConfig(port=0))

    engine = FakeEngine()

    async def main() -> None:
        server = Server(engine, ServerConfig(shutdown_timeout=1.0), LIMITS)
        started.set_result(server)
        await server.run_on(bound)

    def run() -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    yield Served(bound.getsockname()[1], engine)
    server = started.result()
    server.stop()
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        yield one


def all_of(one: socket.socket) -> bytes:
    """Returns what comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := one.recv(65536):
            found += data
    return found


def error_of(answer: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def test_headers_that_trickle_are_not_waited_for(port: int) -> None:
    with connected(port) as one:
        began = time.monotonic()
        one.sendall(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 2:
                one.sendall(b"X-More: 1\r\n")
                time.sleep(0.2)
        status, error = error_of(all_of(one))
    assert (status, error["code"]) == (408, "request_timeout")
    assert "headers" in str(error["message"])


def test_a_body_that_trickles_is_not_waited_for(port: int) -> None:
    with connected(port) as one:
        one.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        for _ in range(3):
            time.sleep(0.1)
            one.sendall(b" ")
        status, error = error_of(all_of(one))
    assert (status, error["code"]) == (408, "request_timeout")
    assert "body" in str(error["message"])


def test_a_connection_that_says_nothing_is_closed_without_a_word(port: int) -> None:
    with connected(port) as one:
        assert all_of(one) == b""


def test_an_idle_connection_is_closed_after_its_answer(port: int) -> None:
    with connected(port) as one:
        one.sendall(HEALTH)
        answer = all_of(one)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_stream_lasts_longer_than_any_deadline(server: Served) -> None:
    body = json.dumps({"prompt": [5], "max_tokens": 400, "stream": True})
    server.engine.is_endless = True
    try:
        with connected(server.port) as one:
            one.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode()))
            end = time.monotonic() + 3 * LIMITS.idle_seconds
            while time.monotonic() < end:
                assert one.recv(65536)
    finally:
        server.engine.is_endless = False


def unread(port: int, request: bytes) -> socket.socket:
    """Returns a connection that has asked and hardly has room for an answer."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    one.settimeout(10)
    one.connect(("127.0.0.1", port))
    one.sendall(request)
    return one


def large_answers() -> bytes:
    """Returns requests on one connection whose answers are more than a kernel keeps."""
    fields = {"prompt": ["x" * 500] * 32, "n": 8, "max_tokens": 0, "echo": True}
    body = json.dumps({**fields, "return_token_ids": True}).encode()
    return (POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)) * NUM_LARGE


def test_an_answer_that_is_not_read_is_cut_off(port: int) -> None:
    """Else such connections stay for ever, and after some thousand of them nobody gets in."""
    with unread(port, large_answers()) as one:
        time.sleep(6 * LIMITS.unread_seconds)
        answers = all_of(one)
    assert answers.startswith(b"HTTP/1.1 200")
    assert answers.count(b'"usage"') < NUM_LARGE


def test_answers_that_are_read_slowly_come_whole(port: int) -> None:
    answers, began = b"", time.monotonic()
    with unread(port, large_answers()) as one:
        while time.monotonic() - began < 6 * LIMITS.unread_seconds:
            answers += one.recv(32768)
            time.sleep(0.05)
        answers += all_of(one)
    assert answers.count(b'"usage"') == NUM_LARGE


@pytest.mark.parametrize(
    "headers",
    [b"X: " + b"a" * 5000 + b"\r\n\r\n", b"X: 1\r\n" * 30 + b"\r\n", b"X: " + b"a" * 9999],
)
def test_too_many_headers_are_refused(port: int, headers: bytes) -> None:
    with connected(port) as one:
        one.sendall(b"GET /health HTTP/1.1\r\n" + headers)
        status, error = error_of(all_of(one))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert "4096" in str(error["message"])


@pytest.mark.parametrize(
    "text", [b"\x00\x01\x02\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n", b"a b c\r\n\r\n"]
)
def test_what_is_no_http_gets_an_error_object(port: int, text: bytes) -> None:
    with connected(port) as one:
        one.sendall(text)
        status, error = error_of(all_of(one))
    assert (status, error["code"]) == (400, "bad_http")


def test_requests_before_their_turn_are_answered_in_order_up_to_a_number(port: int) -> None:
    with connected(port) as one:
        one.sendall(HEALTH * 10 + b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = all_of(one)
    assert answer.count(b"HTTP/1.1 200") == 11
    assert answer.rindex(b'"object":"list"') > answer.rindex(b'"status":"ok"')
    with connected(port) as one:
        one.sendall(HEALTH * (MAX_PIPELINED + 2) * 20)
        answer = all_of(one)
    # One has its turn, others wait; what is one too many is told after their answers.
    assert answer.count(b"HTTP/1.1 200") == MAX_PIPELINED + 1
    assert answer.count(b"HTTP/1.1 400") == 1
    assert b"too_many_pipelined" in answer[answer.rindex(b"HTTP/1.1") :]


def test_connections_beyond_the_limit_are_told_when_to_come_again(port: int) -> None:
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(connected(port)) for _ in range(LIMITS.max_connections)]
        for one in first:
            one.sendall(HEALTH)
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        surplus = stack.enter_context(connected(port))
        surplus.sendall(HEALTH)
        answer = all_of(surplus)
    status, error = error_of(answer)
    assert (status, error["code"]) == (503, "too_many_connections")
    assert b"retry-after: 1" in answer.lower()


def test_a_body_of_tiny_chunks_is_read_whole(port: int) -> None:
    """400 KB in chunks of one byte: parsed in pieces, between which others have their turn."""
    body = json.dumps({"prompt": [5], "max_tokens": 1, "user": "x" * 60_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with connected(port) as one:
        one.sendall(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert all_of(one).startswith(b"HTTP/1.1 200")


OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
)


def completion_body(num_tokens: int) -> bytes:
    return json.dumps({"prompt": [5], "max_tokens": num_tokens, "ignore_eos": True}).encode()


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("cut", [0, 40, 280, 330])
def test_who_offers_another_protocol_is_answered_in_this_one_body_and_all(
    port: int, is_chunked: bool, cut: int
) -> None:
    """As Java's HttpClient offers it with each request, and `curl --http2` with a first one."""
    body = completion_body(3)
    if is_chunked:
        sent = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        sent = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    request = POST + OFFER + sent
    with connected(port) as one:
        one.sendall(request[:cut])
        if cut:
            time.sleep(0.05)
        one.sendall(request[cut:] + HEALTH.replace(b"Host", b"Connection: close\r\nHost"))
        answer = all_of(one)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert b'"completion_tokens":3' in answer
    assert answer.endswith(b'{"status":"ok"}')


def test_offers_in_line_are_answered_each_with_its_own_body(port: int) -> None:
    bodies = [completion_body(number) for number in (1, 2, 3, 4)]
    with connected(port) as one:
        for body in bodies:
            one.sendall(POST + OFFER + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        one.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = all_of(one)
    told = [answer.index(b'"completion_tokens":%d' % number) for number in (1, 2, 3, 4)]
    assert told == sorted(told)


def test_nobody_is_connected_to_elsewhere(port: int) -> None:
    with connected(port) as one:
        one.sendall(b"CONNECT elsewhere:80 HTTP/1.1\r\nHost: x\r\n\r\n" + HEALTH)
        status, error = error_of(all_of(one))
    assert (status, error["code"]) == (400, "bad_http")


def test_a_stream_for_http_1_0_has_no_chunks(port: int) -> None:
    body = json.dumps({"prompt": [5], "max_tokens": 3, "stream": True, "ignore_eos": True}).encode()
    request = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
    with connected(port) as one:
        one.sendall(request + body)
        head, _, events = all_of(one).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"connection: close" in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")
    assert all(event.startswith(b"data: ") for event in events.split(b"\n\n")[:-1])


def test_a_client_that_leaves_with_requests_in_line_leaves_nothing_behind(port: int) -> None:
    asked = {"prompt": [5], "max_tokens": 400, "stream": True, "ignore_eos": True}
    body = json.dumps(asked | {"n": 8})  # long enough for a busy machine to notice
    request = POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    with connected(port) as one:
        one.sendall(request * 3)
        assert one.recv(1024).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with connected(port) as probe:
            probe.sendall(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n")
            text = all_of(probe).decode()
        if 'vllm:request_success_total{engine="0",finished_reason="abort"' in text:
            return
        time.sleep(0.1)
    pytest.fail("the stream of a client that left went on")
