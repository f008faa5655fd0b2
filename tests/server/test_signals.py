"""`octavo serve` as processes: signals at any moment, killed and stopped engines, full pipes.

Whatever happens: no process and no folder stays, no traceback is shown, the exit code is right.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time

import httpx
import pytest

from tests.server.serve_process import MAX_SECONDS, StartServe

CLEAN = {0, 130, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a server that was stopped on demand, before or after Python is in charge."""


def stream(url: str, answers: list[str]) -> threading.Thread:
    """Begins a long stream; its whole text comes into `answers`."""
    begun = threading.Event()
    body = {"prompt": "Once upon a time", "max_tokens": 480, "stream": True, "ignore_eos": True}

    def run() -> None:
        text = ""
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for piece in response.iter_text():
                    text += piece
                    begun.set()
        except httpx.HTTPError as error:
            text += f"broken: {error!r}"
        answers.append(text)
        begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(MAX_SECONDS)
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_nothing(
    start_serve: StartServe, number: signal.Signals
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for latest in (0.6, 2.0, 4.0, 8.0):
        serve = start_serve()
        deadline = time.monotonic() + draw.uniform(0.2, latest)
        while time.monotonic() < deadline:
            serve.find_children()
            time.sleep(0.005)
        serve.process.send_signal(number)
        assert serve.end() in CLEAN, serve.text


def test_a_server_that_is_killed_while_it_starts_leaves_nothing(start_serve: StartServe) -> None:
    for delay in (0.0, 0.5):
        serve = start_serve()
        serve.await_that(serve.find_children)
        time.sleep(delay)
        serve.process.kill()
        assert serve.end() == -signal.SIGKILL


def test_a_server_that_is_killed_takes_a_stopped_engine_along(start_serve: StartServe) -> None:
    serve = start_serve()
    serve.await_url()
    os.kill(serve.engine, signal.SIGSTOP)
    serve.process.kill()
    assert serve.end() == -signal.SIGKILL


def test_a_killed_engine_ends_its_server_with_an_error(start_serve: StartServe) -> None:
    serve = start_serve("--log-format", "json")
    url = serve.await_url().rstrip('",')
    answers: list[str] = []
    thread = stream(url, answers)
    os.kill(serve.engine, signal.SIGKILL)
    thread.join(MAX_SECONDS)
    assert serve.end() == 1
    assert "engine_dead" in answers[0] or "server_error" in answers[0]
    records = [json.loads(line) for line in serve.lines]
    errors = [record["message"] for record in records if record["level"] == "error"]
    assert any("SIGKILL" in message for message in errors)
    assert "uvicorn" not in serve.text


@pytest.mark.slow
def test_a_hung_engine_does_not_hold_up_the_end(start_serve: StartServe) -> None:
    serve = start_serve()
    url = serve.await_url()
    answers: list[str] = []
    thread = stream(url, answers)
    os.kill(serve.engine, signal.SIGSTOP)
    assert httpx.get(f"{url}/health").status_code == 200
    began = time.monotonic()
    assert httpx.get(f"{url}/metrics").status_code == 200
    assert time.monotonic() - began < 10
    serve.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    serve.await_that(lambda: httpx.get(f"{url}/ready").status_code == 503)
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/metrics").status_code == 200
    late = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert late.status_code == 503
    assert late.headers["connection"] == "close"
    assert serve.end() == 1
    assert time.monotonic() - began < 20
    thread.join(MAX_SECONDS)
    assert "no progress" in answers[0]
    assert "stopped by a signal" in serve.text


def test_a_second_signal_ends_at_once(start_serve: StartServe) -> None:
    serve = start_serve("--shutdown-timeout", "3600")
    url = serve.await_url()
    answers: list[str] = []
    thread = stream(url, answers)
    os.kill(serve.engine, signal.SIGSTOP)
    serve.process.send_signal(signal.SIGTERM)
    serve.await_that(lambda: httpx.get(f"{url}/ready").status_code == 503)
    began = time.monotonic()
    serve.process.send_signal(signal.SIGTERM)
    assert serve.end() == 0
    assert time.monotonic() - began < 10
    thread.join(MAX_SECONDS)
    assert "shutting_down" in answers[0]


def test_a_drain_lets_a_stream_end(start_serve: StartServe) -> None:
    serve = start_serve()
    url = serve.await_url()
    answers: list[str] = []
    thread = stream(url, answers)
    serve.process.send_signal(signal.SIGTERM)
    assert serve.end() == 0
    thread.join(MAX_SECONDS)
    assert answers[0].rstrip().endswith("[DONE]")


def test_a_log_that_nobody_reads_holds_up_neither_requests_nor_the_end(
    start_serve: StartServe,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = start_serve("--port", str(port), is_read=False)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        serve.await_that(lambda: is_ready(client))
        for _ in range(1000):  # far more lines than a pipe holds
            assert client.get("/v1/models").status_code == 200
    serve.find_children()
    serve.process.send_signal(signal.SIGTERM)
    assert serve.end() == 0


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False
