"""The guard on vectors, batches, tools, background responses, and with a classifier of Octavo's."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import ServerConfig
from octavo.tools.detect import answer_format
from tests.server.chat_tools import TWO, WEATHER, joined
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine, LongEngine
from tests.server.guards.judges import SEEN
from tests.server.tiny_engine import engine_of

ROOT = Path(__file__).resolve().parents[3]
STRICT = "tests.server.guards.judges:strict"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[AsyncLLM]]:
    """A classifier of two labels with random weights, behind a guard of its own."""
    told = {
        "architectures": ["MixtralForSequenceClassification"],
        "id2label": {"0": "fine", "1": "foul"},
    }
    engine = engine_of(tmp_path_factory.mktemp("classifier"), told, 128)
    server = ServerThread(engine, ServerConfig(port=0, guard=STRICT))
    yield server
    server.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[FakeEngine]]:
    folder = str(tmp_path_factory.mktemp("store"))
    config = ServerConfig(port=0, guard=STRICT, store_dir=folder, shutdown_timeout=1.0)
    server: ServerThread[FakeEngine] = ServerThread(LongEngine(), config)
    yield server
    server.end()


def pooled(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/pooling", json=body, timeout=60)


def test_texts_of_vectors_are_judged_and_rewritten(classifier: ServerThread[AsyncLLM]) -> None:
    assert pooled(classifier.url, input=["fine", "bad"]).json()["error"]["code"] == "content_filter"
    told = pooled(classifier.url, input=["a secret", "b"]).json()["data"]
    assert told == pooled(classifier.url, input=["a XX", "b"]).json()["data"]


def test_the_example_asks_a_classifier_of_octavos(
    classifier: ServerThread[AsyncLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Once upon a time", "there was", "a hello world", "and it counted", "hello"]
    shares = [one["data"][1] for one in pooled(classifier.url, input=texts).json()["data"]]
    low, high = min(shares), max(shares)
    assert low < high
    monkeypatch.setenv("CLASSIFIER_URL", classifier.url)
    monkeypatch.setenv("CLASSIFIER_THRESHOLD", str((low + high) / 2))
    spec = importlib.util.spec_from_file_location(
        "classifier_example", ROOT / "deploy" / "guard" / "classifier.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "classifier_example", module)
    spec.loader.exec_module(module)
    guarded = ServerThread(
        FakeEngine(),
        ServerConfig(port=0, guard="classifier_example:guard", guard_timeout=60.0, guard_window=3),
    )
    try:
        guarded.engine.answer = texts[shares.index(low)]
        for text, share in zip(texts, shares, strict=True):
            body = {"prompt": text, "max_tokens": 100}
            response = httpx.post(f"{guarded.url}/v1/completions", json=body, timeout=60)
            assert response.status_code == (400 if share >= (low + high) / 2 else 200)
        fine = texts[shares.index(low)]
        guarded.engine.answer = texts[shares.index(high)]
        body = {"prompt": fine, "max_tokens": 100}
        found = httpx.post(f"{guarded.url}/v1/completions", json=body, timeout=60).json()
        assert found["choices"][0]["finish_reason"] == "content_filter"
        assert "label 1 has a probability of 0." in found["choices"][0]["stop_reason"]
    finally:
        guarded.end()


def test_a_long_answer_that_comes_at_once_is_no_slow_reader() -> None:
    server = ServerThread(LongEngine(), ServerConfig(port=0, guard=STRICT, guard_window=0))
    try:
        server.engine.answer = "x" * 6000
        body = {"prompt": "x", "max_tokens": 8000, "stream": True}
        told = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text
        assert "x" * 6000 in told
        assert told.endswith("data: [DONE]\n\n")
    finally:
        server.end()


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_judged_as_text_and_still_read(
    server: ServerThread[FakeEngine], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(server.engine, "answer_format", answer_format("<tool_call> </think>", {}))
    called = TWO.replace("Oslo", "secret").replace("days", "secret")
    for answer, reason in ((called, "tool_calls"), (TWO.replace("Oslo", "bad"), "content_filter")):
        server.engine.answer = answer
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "x"}]
            asked = {"model": "fake", "messages": messages, "tools": [WEATHER], "stream": stream}
            found: Any = client.chat.completions.create(**asked)
            if stream:
                content, calls, ended = joined(list(found))
                arguments = [json.loads(call["arguments"]) for call in calls]
            else:
                choice = found.choices[0]
                content, ended = choice.message.content, choice.finish_reason
                made = choice.message.tool_calls or []
                arguments = [json.loads(call.function.arguments) for call in made]
        assert ended == reason
        if reason == "tool_calls":
            assert content == "Let me look."
            assert arguments == [{"city": "Rome", "XX": 2}, {"city": "XX", "XX": 2}]
        else:
            assert all("bad" not in str(one) for one in arguments)


def test_lines_of_batches_are_judged(server: ServerThread[FakeEngine]) -> None:
    server.engine.answer = "a secret"
    bodies = [{"prompt": "bad"}, {"prompt": "good"}]
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    with httpx.Client(base_url=server.url) as http:
        files = {"file": ("x.jsonl", content)}
        file = http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
        batch = http.post("/v1/batches", json={**asked, "completion_window": "24h"}).json()
        deadline = time.monotonic() + 30
        while batch["status"] != "completed":
            assert time.monotonic() < deadline, batch
            time.sleep(0.02)
            batch = http.get(f"/v1/batches/{batch['id']}").json()
        told = http.get(f"/v1/files/{batch['output_file_id']}/content").json()
        wrong = http.get(f"/v1/files/{batch['error_file_id']}/content").json()
    assert told["response"]["body"]["choices"][0]["text"] == "a XX"
    assert wrong["custom_id"] == "0"
    assert wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["code"] == "content_filter"


def test_a_response_in_the_background_is_stored_as_it_was_allowed(
    server: ServerThread[FakeEngine],
) -> None:
    server.engine.answer = "a secret"
    with httpx.Client(base_url=server.url) as http:
        found = http.post("/v1/responses", json={"input": "x", "background": True}).json()
        deadline = time.monotonic() + 30
        while found["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline
            found = http.get(f"/v1/responses/{found['id']}").json()
        assert found["output"][0]["content"][0]["text"] == "a XX"
        # What was stored stands before the next input, and is seen again.
        SEEN.clear()
        http.post("/v1/responses", json={"input": "y", "previous_response_id": found["id"]})
    assert [one.text for one in SEEN[0].texts] == ["x", "a XX", "y"]
