"""Bodies that are meant to harm: each has a clear answer, and a stream beside them goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from tests.server.conftest import ServerThread
from tests.server.tiny_engine import tiny_engine

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
NUM_TOKENS = 400
UNKNOWN = "resp_" + "0" * 32
HELLO = {"role": "user", "content": "Hello!"}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [HELLO], "max_tokens": 4, **more}


def message(**more: Any) -> dict[str, Any]:
    return {"messages": [HELLO], "max_tokens": 4, **more}


def response(**more: Any) -> dict[str, Any]:
    return {"input": "Hello!", "max_output_tokens": 4, **more}


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    inner = {"name": name, "parameters": parameters or {"type": "object"}, **more}
    return {"type": "function", "function": inner}


def of_schema(schema: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def custom(syntax: str, definition: str) -> dict[str, Any]:
    form = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    tool = {"type": "custom", "custom": {"name": "c", "format": form}}
    return chat(tools=[tool], tool_choice="required")


def called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "done"}
    return [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result, HELLO]


MANY = [function(f"f{number}") for number in range(10_000)]
LOOP = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
BOMB = "((((a?){30}){30}){30}){30}"
ATTACKS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "equal names": (CHAT, chat(tools=[function("f"), function("f")]), 400, "same name, 'f'"),
    "equal names of messages": (
        MESSAGES,
        message(tools=[{"name": "f", "input_schema": {"type": "object"}}] * 2),
        400,
        "same name, 'f'",
    ),
    "a schema of no type": (CHAT, of_schema({"type": "objekt"}), 400, "objekt"),
    "a schema that is a text": (CHAT, of_schema("text"), 400, "must be an object"),
    "a tool without a schema": (
        CHAT,
        chat(tools=[function("f", {"type": "object", "properties": {"a": {"type": "objekt"}}})]),
        400,
        "got 'objekt'",
    ),
    "a schema that must contain itself": (CHAT, of_schema(LOOP), 400, "no finite instance"),
    "a tool that must contain itself": (
        CHAT,
        chat(tools=[function("f", LOOP)], tool_choice="required"),
        400,
        "no finite instance",
    ),
    "a grammar that goes round": (CHAT, custom("lark", "start: start"), 400, "no text fits"),
    "a pattern that explodes": (CHAT, chat(structured_outputs={"regex": BOMB}), 200, ""),
    "a tool's pattern that explodes": (CHAT, custom("regex", BOMB), 200, ""),
    "a pattern that cannot be kept": (
        CHAT,
        chat(structured_outputs={"regex": "(" * 5000 + "a" + ")" * 5000}),
        400,
        "invalid regex",
    ),
    "ten thousand tools": (CHAT, chat(tools=MANY), 400, "at most 524288 are taken"),
    "ten thousand tools of responses": (
        RESPONSES,
        response(tools=[{"type": "function", "name": f"f{n}"} for n in range(10_000)]),
        400,
        "at most 1024",
    ),
    "arguments that are no JSON": (CHAT, chat(messages=called("{broken")), 200, ""),
    "arguments that are no JSON, of messages": (
        MESSAGES,
        message(
            messages=[
                HELLO,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "1", "name": "f", "input": "{broken"}],
                },
                HELLO,
            ]
        ),
        400,
        "input must be an object",
    ),
    "an unknown response": (RESPONSES, response(previous_response_id=UNKNOWN), 404, UNKNOWN),
    "a path for a response": (RESPONSES, response(previous_response_id="../x"), 404, "../x"),
    "an unknown item": (
        RESPONSES,
        response(input=[{"type": "item_reference", "id": "msg_x"}]),
        404,
        "msg_x",
    ),
    "a tool of the server": (
        RESPONSES,
        response(tools=[{"type": "web_search"}]),
        400,
        "web_search",
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[Any]]:
    folder: Path = tmp_path_factory.mktemp("attacked")
    started = ServerThread(tiny_engine(folder), ServerConfig(port=0))
    yield started
    started.end()


class Beside:
    """A stream that runs while others attack."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.num_events = 0
        self.has_ended = False
        self.is_wanted = True
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = {"prompt": "Once", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
        while self.is_wanted:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=60) as one:
                lines = [line for line in one.iter_lines() if line.startswith("data")]
            assert lines[-1] == "data: [DONE]"
            self.num_events += len(lines)
            reason = json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
            assert reason == "length"
            self.has_ended = True

    def end(self) -> None:
        self.is_wanted = False
        self._thread.join()
        assert self.has_ended


@pytest.fixture(scope="module")
def beside(server: ServerThread[Any]) -> Iterator[Beside]:
    stream = Beside(server.url)
    yield stream
    stream.end()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_has_a_clear_answer_and_harms_nobody(
    server: ServerThread[Any], beside: Beside, name: str
) -> None:
    path, body, status, words = ATTACKS[name]
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert words in answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("method", ["GET", "DELETE", "cancel"])
def test_an_unknown_response_is_not_found(server: ServerThread[Any], method: str) -> None:
    path = f"{server.url}{RESPONSES}/{UNKNOWN}"
    is_cancel = method == "cancel"
    answer = httpx.request("POST" if is_cancel else method, path + "/cancel" * is_cancel)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "response_not_found"
