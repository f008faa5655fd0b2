"""Clients that leave, engines that fail, servers that end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError, EngineDeadError, OverloadedError, RequestError
from octavo.server.serve import Server, bind, url_of
from octavo.server.signals import StopSignals
from tests.server.fake_engine import FakeEngine

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
}
every_path = pytest.mark.parametrize("path", PATHS)


@every_path
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_silent", [False, True])
def test_a_client_that_leaves_aborts_its_request(
    start_server: Any, path: str, stream: bool, is_silent: bool
) -> None:
    server = start_server()
    server.engine.is_endless = True
    server.engine.is_silent = is_silent
    body = json.dumps({**PATHS[path], "stream": stream}).encode()
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert server.engine.begun.wait(10)
        if stream and not is_silent:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.engine.aborted.wait(10)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("base_url", ["real"], indirect=True)
def test_a_client_that_leaves_frees_its_blocks(http: httpx.Client) -> None:
    # So much that it cannot have finished by the time that the client leaves.
    body: dict[str, Any] = {"prompt": ["Once upon"] * 16, "n": 4, "ignore_eos": True}
    body |= {"max_tokens": 500, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert metric(http, "octavo:kv_cache_usage_perc{") > 0
    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort"'
    deadline = time.monotonic() + 20
    while metric(http, "octavo:kv_cache_usage_perc{") > 0 or not metric(http, aborted):
        assert time.monotonic() < deadline


def metric(http: httpx.Client, start: str) -> float:
    """The value of the first sample whose line begins so; 0 if there is none."""
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(start)), 0.0)


def test_closing_a_stream_of_several_prompts_aborts_all(start_server: Any) -> None:
    server = start_server()
    server.engine.is_endless = True
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        stream = client.completions.create(model="fake", prompt=["a", "b", "c"], stream=True)
        next(stream)
        stream.close()
    assert server.engine.aborted.wait(10)
    server.end()
    assert server.engine.num_running == 0


@every_path
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("no", param="x", code="why"), 400, "why"),
        (OverloadedError("the queue is full", retry_after_seconds=7), 503, "overloaded"),
        (EngineDeadError("it ended"), 503, "engine_dead"),
        (ValueError("secret"), 500, "internal_error"),
    ],
)
def test_an_error_before_the_first_output_keeps_its_status(
    start_server: Any, path: str, stream: bool, error: Exception, status: int, code: str
) -> None:
    server = start_server()
    server.engine.error = error
    response = httpx.post(f"{server.url}{path}", json={**PATHS[path], "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("7" if code == "overloaded" else None)


@every_path
@pytest.mark.parametrize("error", [EngineDeadError("it ended"), ValueError("secret")])
def test_an_error_in_a_stream_is_an_event(start_server: Any, path: str, error: Exception) -> None:
    server = start_server()
    server.engine.error_after = (3, error)
    response = httpx.post(f"{server.url}{path}", json={**PATHS[path], "stream": True})
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in last
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.APIError),
    ):
        list(client.completions.create(model="fake", prompt="x", stream=True))


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_a_sequence_that_did_not_finish_is_an_error(
    start_server: Any, reason: str, status: int
) -> None:
    server = start_server()
    server.engine.finish_reason = reason
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["x", "y"]})
    assert response.status_code == status


@every_path
@pytest.mark.parametrize(("reason", "code"), [("error", "engine_error"), ("abort", "aborted")])
def test_a_sequence_that_did_not_finish_is_an_event_of_its_stream(
    start_server: Any, path: str, reason: str, code: str
) -> None:
    server = start_server()
    server.engine.finish_reason = reason
    body = {**PATHS[path], "stream": True, "max_tokens": 4, "n": 2}
    response = httpx.post(f"{server.url}{path}", json=body)
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code


def test_a_dead_engine_fails_health_but_not_metrics(start_server: Any) -> None:
    server = start_server()
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert "vllm:kv_cache_usage_perc" in http.get("/metrics").text
        server.engine.is_dead = True
        assert http.get("/health").status_code == 503
        assert http.get("/ready").status_code == 503
        assert http.get("/metrics").status_code == 200


def test_metrics_do_not_wait_for_a_silent_engine(start_server: Any) -> None:
    server = start_server()
    server.engine.is_hung = True
    answer = httpx.get(f"{server.url}/metrics", timeout=20)
    assert answer.status_code == 200
    assert "vllm:kv_cache_usage_perc" in answer.text


def test_a_server_whose_engine_died_says_why_and_ends_by_itself(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    server.engine.is_dead = True
    for path in ("/health", "/ping", "/ready"):
        assert "ended with code 9" in httpx.get(f"{server.url}{path}").text
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert isinstance(server.server.error, EngineDeadError)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert any("ended with code 9" in record.getMessage() for record in errors)


def test_a_server_that_ends_answers_probes_and_refuses_work(start_server: Any) -> None:
    server = start_server(shutdown_timeout=30.0)
    server.engine.is_silent = True
    body = {"prompt": "x"}
    asking = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    )
    asking.start()
    assert server.engine.begun.wait(10)
    server.server.stop()
    for path, status in (("/health", 200), ("/ping", 200), ("/metrics", 200), ("/ready", 503)):
        assert httpx.get(f"{server.url}{path}").status_code == status
    late = httpx.post(f"{server.url}/v1/completions", json=body)
    assert late.status_code == 503
    assert late.headers["connection"] == "close"
    assert late.json()["error"]["code"] == "shutting_down"
    server.server.stop()
    asking.join(20)
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_a_hung_engine_is_given_up_in_a_drain(start_server: Any) -> None:
    server = start_server(shutdown_timeout=3600.0)
    server.engine.is_silent = server.engine.is_hung = True
    body = {"prompt": "x"}
    asking = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    )
    asking.start()
    assert server.engine.begun.wait(10)
    server.server.stop()
    asking.join(20)
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_a_server_is_not_ready_before_its_model_is(start_server: Any) -> None:
    server = start_server()
    server.engine.is_ready = False
    assert httpx.get(f"{server.url}/ready").json()["error"]["code"] == "not_ready"
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_lets_running_requests_finish(start_server: Any, stream: bool) -> None:
    server = start_server(shutdown_timeout=30.0)
    server.engine.is_endless = True
    answers = []

    def ask() -> None:
        body = {"prompt": "x", "stream": stream}
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    assert server.engine.begun.wait(10)
    server.server.stop()
    assert server.server.drain.is_draining
    server.engine.is_endless = False
    thread.join(20)
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert answers[0].status_code == 200
    assert not server.engine.aborted.is_set()


@pytest.mark.parametrize("is_impatient", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_outlives_its_server_is_told(
    start_server: Any, stream: bool, is_impatient: bool
) -> None:
    server = start_server(shutdown_timeout=3600.0 if is_impatient else 0.1)
    server.engine.is_silent = not stream
    server.engine.is_endless = True
    answers = []

    def ask() -> None:
        body = {"prompt": "x", "stream": stream}
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    assert server.engine.begun.wait(10)
    server.server.stop()
    if is_impatient:
        server.server.stop()
    thread.join(20)
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert "shutting_down" in answers[0].text
    assert server.engine.aborted.is_set()


SERVE = """
import asyncio
from octavo.config import ServerConfig
from octavo.server.serve import bind, serve, url_of
from tests.server.fake_engine import FakeEngine

async def main():
    bound = bind(ServerConfig(port=0))
    print(url_of(bound), flush=True)
    await serve(FakeEngine(), ServerConfig(port=0), bound)
    print("closed", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_leaves_time_to_close_the_engine(sent: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/ready").status_code == 200
        process.send_signal(sent)
        rest, _ = process.communicate(timeout=20)
    assert rest == "closed\n"
    assert process.returncode == 0


def test_a_port_in_use_is_refused_at_once() -> None:
    with bind(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another port") as caught:
            bind(ServerConfig(port=port))
        assert caught.value.field == "port"
        assert url_of(first) == f"http://127.0.0.1:{port}"


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        bind(ServerConfig(host="no such host", port=0))
    assert caught.value.field == "host"


async def test_a_signal_that_came_before_the_server_listened_ends_it() -> None:
    signals, config = StopSignals(), ServerConfig(port=0)
    loading: list[bool] = []
    signals.listen(lambda: loading.append(True))
    # As it comes while the app is made, after the loading and before the serving.
    signals._handle(signal.SIGINT, None)
    assert loading == [True]
    with bind(config) as bound:
        server = Server(FakeEngine(), config, signals=signals)
        await asyncio.wait_for(server.run_on(bound), 30)
    assert server.error is None


async def test_where_it_serves_is_said_once_it_answers() -> None:
    config, said = ServerConfig(port=0), []
    with bind(config) as bound:
        server = Server(FakeEngine(), config, on_serving=lambda: said.append(server.started))
        serving = asyncio.ensure_future(server.run_on(bound))
        while not said:
            await asyncio.sleep(0.01)
        server.stop()
        await asyncio.wait_for(serving, 30)
    assert said == [True]
