"""A stand-in for an OpenAI-compatible server, so that clients are tested without an engine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class FakeServer:
    """Streams as many pieces as `max_tokens` says; refuses all with the message `refuse`."""

    url: str = ""
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    refuse: str | None = None
    delay: float = 0.0
    """Seconds before each piece."""
    tells_usage: bool = True
    cut_after: int | None = None
    """Events after which a stream's connection is reset."""
    num_open: int = 0
    most_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        yield
        with self.lock:
            self.num_open -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fake.paths.append(self.path)
        if self.fake.key and self.headers.get("Authorization") != f"Bearer {self.fake.key}":
            return self._json(401, {"error": {"message": "the API key is wrong"}})
        return self._json(200, {"data": [{"id": "fake-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.paths.append(self.path)
        self.fake.bodies.append(body)
        if self.fake.refuse is not None:
            return self._json(400, {"error": {"message": self.fake.refuse}})
        with self.fake.counted():
            self._stream(body)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body.get("max_tokens", 3)
        for index in range(count):
            if index == self.fake.cut_after:
                self.close_connection = True
                return
            time.sleep(self.fake.delay)
            piece = f"w{index} "
            choice = (
                {"index": 0, "delta": {"content": piece}}
                if "messages" in body
                else {"index": 0, "text": piece}
            )
            self._event({"choices": [choice]})
        prompt = body.get("prompt", [])
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        if self.fake.tells_usage:
            self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served_fake() -> Iterator[FakeServer]:
    fake = FakeServer()
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with served_fake() as fake:
        yield fake


@pytest.fixture
def tiny_options(tiny_model: str, tmp_path: Path) -> list[str]:
    return [
        tiny_model,
        "--load-format=dummy",
        "--skip-tokenizer-init",
        "--device=cpu",
        "--num-threads=1",
        "--kv-cache-memory=16MiB",
        f"--output={tmp_path / 'out.jsonl'}",
    ]
