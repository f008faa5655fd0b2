"""A machine that is about to go: what runs is finished, what has not begun goes elsewhere."""

from __future__ import annotations

import concurrent.futures
import itertools
import re
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.notice import watch_notice
from octavo.server.signals import NOTICE, StopSignals

ROOT = Path(__file__).resolve().parents[2]
BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 4}


def ask(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**BODY, **more}, timeout=30)


def test_what_has_not_begun_is_handed_back_to_be_sent_again_at_once(start_server: Any) -> None:
    server = start_server(shutdown_timeout=5.0)
    server.engine.is_silent = True
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, server.url, stream=stream) for stream in (False, True)]
        while server.engine.num_running < 2:
            time.sleep(0.01)
        server.server.preempt()
        for one in waiting:
            answer = one.result()
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "0"
            assert answer.json()["error"]["code"] == "overloaded"
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_what_has_begun_is_finished_and_what_is_new_need_not_wait(start_server: Any) -> None:
    server = start_server(shutdown_timeout=5.0)
    server.engine.is_endless = True
    body = {**BODY, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        server.server.preempt()
        late = ask(server.url)
        assert (late.status_code, late.headers["Retry-After"]) == (503, "0")
        server.engine.is_endless = False
        assert list(lines)[-2] == "data: [DONE]"


class Balancer(httpx.HTTPTransport):
    """The first attempt meets the machine that goes."""

    def __init__(self, going: str, staying: str) -> None:
        super().__init__()
        self._urls = itertools.chain([going], itertools.repeat(staying))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = httpx.URL(next(self._urls))
        request.url = request.url.copy_with(host=url.host, port=url.port)
        return super().handle_request(request)


def test_openais_own_client_sends_again_what_was_handed_back(start_server: Any) -> None:
    going, staying = start_server(shutdown_timeout=5.0), start_server()
    going.engine.is_silent = True
    http = httpx.Client(transport=Balancer(going.url, staying.url))
    with (
        openai.OpenAI(base_url="http://fleet/v1", api_key="none", http_client=http) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(client.completions.create, model="fake", **BODY)
        while not going.engine.num_running:
            time.sleep(0.01)
        going.server.preempt()
        assert asked.result().choices[0].text
    assert len(staying.engine.requests) == 1


def test_the_documents_policy_for_tenacity_sends_it_again(
    start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (code,) = (one for one in re.findall(r"```py\n(.*?)```", text, re.S) if "tenacity" in one)
    names: dict[str, Any] = {}
    exec(code, names)
    going, staying = start_server(shutdown_timeout=5.0), start_server()
    going.engine.is_silent = True
    with (
        httpx.Client(transport=Balancer(going.url, staying.url)) as http,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        monkeypatch.setattr(httpx, "post", http.post)
        asked = pool.submit(names["complete"], "x")
        while not going.engine.num_running:
            time.sleep(0.01)
        going.server.preempt()
        assert asked.result()
    assert len(staying.engine.requests) == 1


def test_a_file_that_appears_is_a_notice(start_server: Any, tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    server = start_server(shutdown_timeout=5.0, preemption_notice=str(notice))
    assert ask(server.url).status_code == 200
    notice.touch()
    server.thread.join(10)
    assert not server.thread.is_alive()


async def test_a_url_is_a_notice_once_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.notice.LOOK_SECONDS", 0.05)
    answers = iter([(404, ""), (200, "FALSE"), (503, "TRUE"), (200, "NONE"), (200, "TRUE")])
    asked: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = next(answers)
            asked.append(status)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    told: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        Thread(target=service.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{service.server_port}/preempted"
        await watch_notice(ServerConfig(preemption_notice=url), lambda: told.append(len(asked)))
        service.shutdown()
    assert told == [5]


@pytest.mark.parametrize("notice", ["ftp://host/x", "http://", "HTTP:///x"])
def test_a_url_that_nobody_can_ask_is_no_file(notice: str) -> None:
    with pytest.raises(ConfigError, match="preemption_notice must be a file or an http URL"):
        ServerConfig(preemption_notice=notice).resolve()


def test_the_signal_is_told_to_whoever_listens_and_to_who_comes_later() -> None:
    told: list[str] = []
    before = {number: signal.getsignal(number) for number in (*signal.Signals,) if number == NOTICE}
    signals = StopSignals()
    try:
        signal.signal(NOTICE, signals._handle_notice)
        signals.listen_to_notice(lambda: told.append("first"))
        signal.raise_signal(NOTICE)
        signals.listen_to_notice(lambda: told.append("later"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert told == ["first", "later"]
