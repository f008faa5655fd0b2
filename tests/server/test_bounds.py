"""One client's requests, whatever they are, do not keep the server from others.

A real server with `--debug-loop-holds` gets all that once held its event loop, while somebody's
stream goes on. The promise is 20 ms of CPU time; asserted is ten times that, the figure printed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.observe.loop_holds import PROMISED_SECONDS
from tests.server.tiny_engine import write_model

ROOM = 10
CONTEXT = 4096
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
WORDS = "lorem ipsum dolor sit amet "


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as a user starts it, of a tiny model with a context of 4,096."""
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    with served(folder) as where:
        yield where


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    octavo = str(Path(sys.executable).with_name("octavo"))
    command = [octavo, "serve", str(folder), "--port", str(port)]
    command += ["--load-format", "dummy", "--dtype", "float32", "--device", "cpu"]
    command += ["--kv-cache-memory-bytes", "64MiB", "--num-threads", "1", "--debug-loop-holds"]
    command += ["--max-num-queued-requests", "64", "--max-num-seqs", "32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    where = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{where}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield where
    finally:
        process.terminate()
        process.wait(30)


def post(url: str, path: str, body: object) -> tuple[int, bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = httpx.post(url + path, content=content, headers=headers, timeout=120)
    return answer.status_code, answer.content


def longest_hold(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    [line] = [one for one in text.splitlines() if one.startswith("octavo:event_loop_longest")]
    return float(line.split()[1])


class Stream:
    """Somebody's stream, begun again a while after it ends, so that others get the cores,
    too; its longest gap, the wait for its first token among them, is what it sees."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self.gaps: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        body = {"prompt": "Tell", "max_tokens": 200, "ignore_eos": True, "stream": True}
        while not self._over.wait(0.3):
            last = time.monotonic()
            with httpx.stream("POST", self._url + TEXT, json=body, timeout=120) as answer:
                for _ in answer.iter_lines():
                    now = time.monotonic()
                    self.gaps.append(now - last)
                    last = now
                    if self._over.is_set():
                        return

    def end(self) -> float:
        self._over.set()
        self._thread.join(60)
        return max(self.gaps)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


MANY = {"type": "object", "properties": {f"p{n}": {"enum": ["a", "b"]} for n in range(24_000)}}
"""A schema of a hundred thousand objects."""
LONG_TALK = [user("hello there")] * 12_000

BODIES: dict[str, tuple[str, Any, int]] = {
    "a text far beyond the context": (TEXT, {"prompt": WORDS * 35_000}, 400),
    "a text above the largest body": (TEXT, {"prompt": WORDS * 150_000}, 413),
    "a text of the context's longest": (TEXT, {"prompt": "x" * 50_000}, 400),
    "a text that is cut": (
        TEXT,
        {"prompt": WORDS * 1_500, "truncate_prompt_tokens": 50, "max_tokens": 1},
        200,
    ),
    "many texts": (TEXT, {"prompt": ["x" * 1000] * 1000, "max_tokens": 4000}, 400),
    "many ids": (TEXT, {"prompt": [1] * 350_000}, 400),
    "many prompts of ids": (TEXT, {"prompt": [[1] * 350] * 1000, "max_tokens": 4000}, 400),
    "a million of lists": (TEXT, b'{"prompt": [' + b"[]," * 380_000 + b"[]]}", 400),
    "objects": (TEXT, b'{"prompt": [' + b'{"a":1},' * 140_000 + b"1]}", 400),
    "unknown fields": (TEXT, {f"x{i}": i for i in range(60_000)}, 400),
    "depth": (TEXT, b"[" * 1_100_000, 400),
    "a huge integer": (TEXT, b'{"prompt": "x", "n": ' + b"1" * 1_100_000 + b"}", 400),
    "stop strings": (TEXT, {"prompt": "x", "stop": ["ab"] * 150_000}, 400),
    "long stop strings": (TEXT, {"prompt": "x", "stop": ["a" * 60_000], "max_tokens": 1}, 200),
    "bad words": (
        TEXT,
        {"prompt": ["x"] * 100, "bad_words": ["ab cd ef gh ij"] * 128, "max_tokens": 1},
        200,
    ),
    "long bad words": (TEXT, {"prompt": "x", "bad_words": ["ab " * 20_000]}, 400),
    "a bias for every token": (
        TEXT,
        {"prompt": "x", "logit_bias": {str(i): 1 for i in range(320)}, "max_tokens": 1},
        200,
    ),
    "allowed ids": (TEXT, {"prompt": "x", "allowed_token_ids": [5] * 65_000, "max_tokens": 1}, 200),
    "one long message": (CHAT, {"messages": [user(WORDS * 35_000)]}, 400),
    "a long message that fits": (CHAT, {"messages": [user("the " * 900)], "max_tokens": 1}, 200),
    "many messages": (CHAT, {"messages": [user("x")] * 20_000}, 400),
    "many parts": (CHAT, {"messages": [user([{"type": "text", "text": "x"}] * 25_000)]}, 400),
    "special tokens": (CHAT, {"messages": [user("<|im_end|>" * 60)], "max_tokens": 1}, 200),
    "tokenise": ("/tokenize", {"prompt": WORDS * 1_500, "return_token_strs": True}, 200),
    "tokenise beyond": ("/tokenize", {"prompt": WORDS * 35_000}, 400),
    "detokenise": ("/detokenize", {"tokens": [70] * 4_000}, 200),
    "detokenise beyond": ("/detokenize", {"tokens": [70] * 280_000}, 400),
    "log-probabilities of a prompt": (
        TEXT,
        {"prompt": [7] * 3_500, "prompt_logprobs": 100, "max_tokens": 1},
        200,
    ),
    "an echo with log-probabilities": (
        TEXT,
        {"prompt": [7] * 3_500, "echo": True, "logprobs": 100, "max_tokens": 1},
        200,
    ),
    "the same as a stream": (
        TEXT,
        {"prompt": [7] * 3_500, "echo": True, "logprobs": 100, "max_tokens": 1, "stream": True},
        200,
    ),
    "a schema of many objects": (
        CHAT,
        {
            "messages": [user("x")],
            "response_format": {"type": "json_schema", "json_schema": {"schema": MANY}},
        },
        400,
    ),
    "the same in a response": (
        RESPONSES,
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": MANY}}},
        400,
    ),
    "a guided schema of many objects": (TEXT, {"prompt": "x", "guided_json": MANY}, 400),
    "a tool of many objects": (
        CHAT,
        {
            "messages": [user("x")],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": MANY}}],
        },
        400,
    ),
    "the same in a message": (
        MESSAGES,
        {
            "messages": [user("x")],
            "max_tokens": 1,
            "tools": [{"name": "f", "input_schema": MANY}],
        },
        400,
    ),
    "many special tokens": (CHAT, {"messages": [user("<|im_end|>" * 80_000)]}, 400),
    "tokens to count": (f"{MESSAGES}/count_tokens", {"messages": [user("x")] * 20_000}, 200),
    "a talk that is cut": (
        RESPONSES,
        {"input": LONG_TALK, "truncation": "auto", "max_output_tokens": 1},
        200,
    ),
    "items that are no text": (
        RESPONSES,
        {
            "input": [{"type": "reasoning", "summary": []}] * 20_000 + [user("x")],
            "max_output_tokens": 1,
        },
        200,
    ),
    "items that are none": (RESPONSES, {"input": [{}] * 20_000}, 400),
    "a prompt to render": (f"{TEXT}/render", {"prompt": [[7] * 4_000] * 60, "max_tokens": 1}, 200),
    "a prompt to explain": ("/v1/cache/explain", {"prompt": [7] * 4_000, "max_tokens": 1}, 200),
    "documents to rerank": ("/v1/rerank", {"query": "x", "documents": ["y"] * 100_000}, 400),
    "texts to embed": ("/v1/embeddings", {"input": ["y"] * 100_000}, 400),
    "many choices": (TEXT, {"prompt": [[5]] * 512, "n": 2, "max_tokens": 2, "logprobs": 5}, 200),
}


def test_no_request_holds_the_loop_longer_than_promised(url: str) -> None:
    # What is made with the first request of its kind is no request's doing.
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/health"):
        httpx.get(url + path, timeout=60)
    before, stream = longest_hold(url), Stream(url)
    holds: dict[str, float] = {}
    try:
        for name, (path, body, expected) in BODIES.items():
            status, content = post(url, path, body)
            assert status == expected, (name, status, content[:300])
            if expected >= 400:
                assert json.loads(content)["error"]["message"], name
            holds[name] = longest_hold(url)
            assert holds[name] < ROOM * PROMISED_SECONDS, (name, holds[name])
    finally:
        gap = stream.end()
    print(f"longest hold {1e3 * max(holds.values()):.1f} ms, before {1e3 * before:.1f} ms")
    print(f"longest gap in the stream of another {gap:.2f} s")
    for name, hold in holds.items():
        print(f"  {1e3 * hold:6.1f} ms after {name}")
    assert gap < 10


SLOWLY_READ: dict[str, tuple[str, dict[str, Any]]] = {
    "log-probabilities of choices": (TEXT, {"prompt": "x", "n": 32, "logprobs": 100}),
    "log-probabilities of a chat": (
        CHAT,
        {"messages": [user("x")], "n": 32, "logprobs": True, "top_logprobs": 20},
    ),
    "log-probabilities of the prompt, then choices": (
        TEXT,
        {"prompt": [7] * 1_000, "n": 4, "prompt_logprobs": 100},
    ),
}


@pytest.mark.parametrize(("path", "body"), SLOWLY_READ.values(), ids=SLOWLY_READ)
def test_what_a_slow_reader_of_a_stream_has_missed_does_not_hold_the_loop(
    url: str, path: str, body: dict[str, Any]
) -> None:
    host, port = url.removeprefix("http://").split(":")
    whole = {**body, "max_tokens": 120, "ignore_eos": True, "stream": True}
    content = json.dumps(whole).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(60)
        reader.connect((host, int(port)))
        reader.sendall(head.encode() + content)
        answer = reader.recv(1024)
        wait_until_idle(url)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        while data := reader.recv(2**20):
            answer += data
    assert answer.count(b"data: [DONE]") == 1
    assert b'"error"' not in answer
    assert longest_hold(url) < ROOM * PROMISED_SECONDS


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
        [line] = [one for one in lines if one.startswith("octavo:num_requests_running{")]
        if float(line.split()[-1]) == 0:
            return
        time.sleep(0.2)
    raise AssertionError("requests still run")


def test_what_does_not_fit_says_both_numbers(url: str) -> None:
    for path, body in (
        (TEXT, {"prompt": "x" * 900_000}),
        (CHAT, {"messages": [user("x" * 900_000)]}),
        ("/tokenize", {"prompt": "x" * 900_000}),
    ):
        status, content = post(url, path, body)
        error = json.loads(content)["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert str(CONTEXT) in error["message"]
        assert "900" in error["message"]


def test_a_flood_is_refused_at_once_and_the_queue_is_served(url: str) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 30, "ignore_eos": True})
    num_clients = 600

    def ask(_: int) -> tuple[int, float, bool]:
        host, port = url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        began = time.monotonic()
        connection.request("POST", TEXT, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, time.monotonic() - began, answer.getheader("Retry-After") is not None

    with concurrent.futures.ThreadPoolExecutor(num_clients) as clients:
        answers = list(clients.map(ask, range(num_clients)))
    refused = [one for one in answers if one[0] == 503]
    assert {status for status, _, _ in answers} == {200, 503}
    assert all(has_retry_after for _, _, has_retry_after in refused)
    assert refused
    assert longest_hold(url) < ROOM * PROMISED_SECONDS
    assert post(url, TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200
