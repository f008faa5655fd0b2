"""A guard behind HTTP: what it is sent, and whatever it may answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.guard import GuardCheck, GuardText, Refuse
from octavo.server.guards.endpoint import Endpoint
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine

ALLOW = b'{"action": "allow"}'


class Judge(ThreadingHTTPServer):
    """Answers `verdicts` by stage, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.verdicts: dict[str, tuple[int, bytes]] = {}
        self.asked: list[dict[str, Any]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/check"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge

    def do_POST(self) -> None:
        check = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(check)
        status, content = self.server.verdicts.get(check["stage"], (200, ALLOW))
        if status == 0:
            self.server.released.wait(30)
            return
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    thread = threading.Thread(target=judge.serve_forever, args=(0.05,))
    thread.start()
    yield judge
    judge.released.set()
    judge.shutdown()
    judge.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(judge: Judge) -> Iterator[ServerThread[FakeEngine]]:
    config = ServerConfig(
        port=0, shutdown_timeout=1.0, guard_url=judge.url, guard_timeout=1.0, guard_window=5
    )
    server = ServerThread(FakeEngine(), config)
    server.engine.answer = "hello world"
    yield server
    server.end()


def complete(server: ServerThread[FakeEngine], **fields: Any) -> httpx.Response:
    body = {"prompt": "my prompt", **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body)


def test_a_check_is_json_with_all_its_fields(
    server: ServerThread[FakeEngine], judge: Judge
) -> None:
    judge.verdicts.clear()
    judge.asked.clear()
    assert complete(server, request_id="x").json()["choices"][0]["text"] == "hello world"
    text = {"role": "prompt", "place": "prompt", "text": "my prompt", "is_fixed": False}
    common = {"route": "/v1/completions", "model": "fake", "tenant": "", "key": "", "index": 0}
    common |= {"request_id": judge.asked[0]["request_id"], "before": "", "is_last": True}
    assert judge.asked[0] == {"stage": "input", "texts": [text], **common}
    text = {"role": "assistant", "place": "choices[0]", "text": "hello world", "is_fixed": False}
    assert judge.asked[1] == {"stage": "output", "texts": [text], **common}


def test_its_verdicts_are_kept(server: ServerThread[FakeEngine], judge: Judge) -> None:
    judge.verdicts = {"input": (200, b'{"action": "refuse", "reason": "no"}')}
    response = complete(server)
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(": no")
    judge.verdicts = {
        "input": (200, b'{"action": "rewrite", "texts": ["other"]}'),
        "output": (200, '{"action": "rewrite", "texts": ["w\u00f6rd"], "more": 1}'.encode()),
    }
    assert complete(server, echo=True).json()["choices"][0]["text"] == "otherw\u00f6rd"
    judge.verdicts = {"output": (200, b'{"action": "refuse", "reason": "no"}')}
    assert complete(server).json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "verdict",
    [
        (500, b"{}"),
        (204, b""),
        (302, ALLOW),
        (200, b"no json"),
        (200, b"[]"),
        (200, b'{"action": "perhaps"}'),
        (200, b'{"action": "rewrite"}'),
        (200, b'{"action": "rewrite", "texts": []}'),
        (200, b'{"action": "rewrite", "texts": [1]}'),
        (200, b'{"action": "refuse", "reason": 5}'),
        (200, b'{"action": "rewrite", "texts": ["\\ud800"]}'),
        (200, b"\xff"),
        (0, b""),
    ],
    ids=lambda one: f"{one[0]}-{one[1][:40]!r}",
)
def test_what_is_no_verdict_closes_the_server(
    server: ServerThread[FakeEngine], judge: Judge, verdict: tuple[int, bytes]
) -> None:
    judge.verdicts = {"input": verdict}
    response = complete(server)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_unavailable"


async def test_a_text_that_is_no_unicode_is_judged_and_no_failure_of_the_guard(
    judge: Judge,
) -> None:
    judge.verdicts = {"input": (200, b'{"action": "refuse", "reason": "no"}')}
    judge.asked.clear()
    text = GuardText(role="user", place="prompt", text="bad \ud800 w\u00f6rd")
    check = GuardCheck(
        stage="input",
        texts=(text,),
        request_id="x",
        route="/v1/completions",
        model="fake",
        tenant="",
        key="\udfff",
    )
    endpoint = Endpoint(judge.url, 1)
    assert await endpoint(check) == Refuse("no")
    await endpoint.close()
    assert judge.asked[0]["texts"][0]["text"] == "bad ? w\u00f6rd"
    assert judge.asked[0]["key"] == "?"


def test_a_guard_that_is_gone_closes_the_server_in_a_stream_too() -> None:
    config = ServerConfig(
        port=0, guard_url="http://127.0.0.1:9/", guard_stages="output", guard_window=3
    )
    gone = ServerThread(FakeEngine(), config)
    try:
        assert complete(gone, stream=True).status_code == 503
        page = httpx.get(f"{gone.url}/metrics").text
        assert 'octavo:guard_checks_total{outcome="error",stage="output"} 1.0' in page
        assert "octavo:guard_check_seconds_count 1.0" in page
    finally:
        gone.end()
