"""Prompts as tokens, from a server and from the command, and SageMaker's routes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from octavo.cli.commands import parse, run
from tests.server.tiny_engine import write_model

DUMMY = ("--load-format", "dummy")  # a folder without weights
USER = [{"role": "user", "content": "Hello <|im_end|>"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CHAT = {"messages": USER, "tools": [TOOL]}


def test_a_chat_is_rendered_as_it_would_be_answered(http: httpx.Client) -> None:
    rendered = http.post("/v1/chat/completions/render", json=CHAT).json()
    tokenized = http.post("/tokenize", json=CHAT).json()
    assert rendered["token_ids"] == tokenized["tokens"]
    assert rendered["num_tokens"] == len(rendered["token_ids"])
    assert "Hello <|im_end|>" in rendered["text"]
    answer = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == rendered["num_tokens"]


def test_the_prompts_of_a_completion_are_rendered(http: httpx.Client) -> None:
    body = {"prompt": ["Hello", "you"]}
    told = http.post("/v1/completions/render", json=body).json()["data"]
    for text, one in zip(body["prompt"], told, strict=True):
        tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert one == {"num_tokens": len(tokens), "token_ids": tokens}
    told = http.post("/v1/completions/render", json={"prompt": [1, 2]}).json()["data"]
    assert told == [{"num_tokens": 2, "token_ids": [1, 2]}]
    refused = http.post("/v1/completions/render", json={"prompt": []})
    assert refused.json()["error"]["param"] == "prompt"


def test_sagemaker_is_answered_on_one_route(http: httpx.Client) -> None:
    assert http.get("/ping").status_code == 200
    chat = http.post("/invocations", json={"messages": USER, "max_tokens": 2}).json()
    assert chat["object"] == "chat.completion"
    completion = http.post("/invocations", json={"prompt": "Hello", "max_tokens": 2}).json()
    assert completion["object"] == "text_completion"
    body = {"messages": USER, "max_tokens": 2, "stream": True}
    assert http.post("/invocations", json=body).text.endswith("data: [DONE]\n\n")
    error = http.post("/invocations", json={"messages": USER, "max_token": 2}).json()["error"]
    assert "did you mean max_tokens?" in error["message"]
    assert http.post("/invocations", json={}).json()["error"]["param"] == "prompt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("tiny")))


def rendered(
    argv: list[str],
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[dict[str, Any]]:
    given = io.BytesIO(json.dumps(body).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=given))
    assert run(parse(["render", *argv])) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_renders_without_an_engine(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    [chat] = rendered([model, *DUMMY], CHAT, monkeypatch, capsys)
    assert chat["text"].startswith("<|im_start|>system\n")
    assert chat["num_tokens"] == len(chat["token_ids"])
    prompts = rendered([model, *DUMMY], {"prompt": ["a", "b"]}, monkeypatch, capsys)
    assert [one["num_tokens"] for one in prompts] == [1, 1]
    body = {"model": "any", "messages": USER, "system": "Be brief.", "max_tokens": 5}
    [message] = rendered([model, *DUMMY, "--api", "messages"], body, monkeypatch, capsys)
    assert message["text"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    missing = str(tmp_path / "none.json")
    assert run(parse(["render", model, "--body", missing])) == 2
    assert "cannot be read" in capsys.readouterr().err
