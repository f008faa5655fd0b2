"""`octavo serve` as a process: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]


@pytest.fixture
def serve(tiny_chat_model: str) -> Iterator[subprocess.Popen[str]]:
    argv = [
        *COMMAND,
        "serve",
        tiny_chat_model,
        "--port=0",
        "--served-model-name=tiny",
        "--api-key=k",
        "--metrics-port=0",
    ]
    more = ["--load-format=dummy", "--device=cpu", "--num-threads=1"]
    process = subprocess.Popen(
        [*argv, *more, "--kv-cache-memory=16MiB"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Returns what the process printed up to the line with `words`."""
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if words in line:
            return text
    raise AssertionError(f"ended without {words!r}:\n{text}")


def test_it_prints_plan_url_and_example_serves_and_ends_cleanly(serve: subprocess.Popen[str]):
    shown = read_until(serve, "/metrics")
    metrics_url = shown.split()[-1]
    with urllib.request.urlopen(metrics_url, timeout=60) as metrics:
        assert b"octavo:num_requests_running" in metrics.read()
    assert "memory plan" in shown
    assert "KV cache" in shown
    assert "curl http://127.0.0.1:" in shown
    assert "Authorization: Bearer" in shown
    assert '"model": "tiny"' in shown
    url = next(word for word in shown.split() if word.startswith("http://"))
    body = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer k"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    serve.send_signal(signal.SIGINT)
    assert serve.wait(timeout=30) == 0


def test_a_port_in_use_is_refused_before_the_model_is_looked_at():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*COMMAND, "serve", "/no/such/model", f"--port={port}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "/no/such/model" not in done.stderr


def test_a_model_that_does_not_fit_says_what_would(tiny_model: str):
    done = subprocess.run(
        [
            *COMMAND,
            "serve",
            tiny_model,
            "--port=0",
            "--load-format=dummy",
            "--device=cpu",
            "--skip-tokenizer-init",
            "--kv-cache-memory=100GiB",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "octavo serve: error: kv_cache_memory_bytes is" in done.stderr
    assert "Traceback" not in done.stderr
