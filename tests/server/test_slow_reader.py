"""A client that does not read its stream costs a bounded amount, and its request ends."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx

from octavo.engine.mailbox import MAX_WAITING_TOKENS


def stream(url: str, **body: Any) -> socket.socket:
    """Asks for an endless stream on a connection that takes little."""
    address = httpx.URL(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect((address.host, address.port))
    content = json.dumps({"prompt": "x", "stream": True, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_stream_that_nobody_reads_is_ended_with_its_connection(start_server: Any) -> None:
    server = start_server()
    server.engine.is_endless = True
    with stream(server.url) as connection:
        assert server.engine.aborted.wait(60), "the request of a client that never reads goes on"
        assert server.engine.num_running == 0
        received = 0
        try:
            while data := connection.recv(65536):
                received += len(data)
        except ConnectionResetError:
            pass
        # What the sockets held, and nothing of what waited: at most as many tokens as may wait.
        assert received < 64 * 2**20
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_reader_that_stops_for_a_while_loses_nothing(start_server: Any) -> None:
    server = start_server()
    num_tokens = MAX_WAITING_TOKENS // 2
    server.engine.max_model_len = 10**6
    with stream(server.url, max_tokens=num_tokens, ignore_eos=True) as connection:
        time.sleep(0.5)
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text += connection.recv(65536)
    events = [line for line in text.split(b"\n") if line.startswith(b"data: {")]
    assert sum(len(json.loads(e[6:])["choices"][0]["text"]) for e in events) == num_tokens
    assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
