"""What the operator lets a request be: tokens of a prompt, messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine

LIMITS = {"max_prompt_tokens": 40, "max_messages": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[FakeEngine]]:
    folder = str(tmp_path_factory.mktemp("store"))
    config = ServerConfig(port=0, store_dir=folder, shutdown_timeout=1.0, **LIMITS)  # type: ignore[arg-type]
    found = ServerThread(FakeEngine(), config)
    yield found
    found.end()


def refused(server: ServerThread[FakeEngine], path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", json={"max_tokens": 2, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def messages(count: int, text: str = "x") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}] * count


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x" * 40}, "prompt"),
        ("/v1/completions", {"prompt": ["x", "y" * 40]}, "prompt"),
        ("/v1/completions", {"prompt": [7] * 41}, "prompt"),
        ("/v1/chat/completions", {"messages": messages(1, "x" * 40)}, "messages"),
        ("/v1/responses", {"input": "x" * 40, "max_tokens": None}, "input"),
        ("/invocations", {"prompt": "x" * 40}, "prompt"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_the_limit(
    server: ServerThread[FakeEngine], path: str, body: dict[str, Any], param: str
) -> None:
    error = refused(server, path, body)
    assert (error["code"], error["param"]) == ("prompt_too_long", param)
    assert "at most 40" in error["message"]
    assert "--max-prompt-tokens" in error["message"]
    assert param in error["message"]


def test_prompts_up_to_the_limit_are_taken(server: ServerThread[FakeEngine]) -> None:
    for prompt, cut in (("x" * 39, None), ([7] * 40, None), ("x" * 300, 40)):
        body = {"prompt": prompt, "max_tokens": 2, "truncate_prompt_tokens": cut}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200


def test_a_chat_of_too_many_messages_is_told_the_limit(server: ServerThread[FakeEngine]) -> None:
    asked = {
        "/v1/chat/completions": ({"messages": messages(4)}, "messages"),
        "/v1/responses": ({"input": messages(4), "max_tokens": None}, "input"),
    }
    for path, (body, param) in asked.items():
        error = refused(server, path, body)
        assert (error["code"], error["param"]) == ("too_many_messages", param)
        assert "there are 4 messages, and this server takes at most 3" in error["message"]
    turns = [{"role": ("user", "assistant")[n % 2], "content": "x"} for n in range(5)]
    body: dict[str, Any] = {"messages": turns, "max_tokens": 2}
    response = httpx.post(f"{server.url}/v1/messages", json=body)
    assert response.status_code == 400
    assert "at most 3" in response.json()["error"]["message"]
    body["messages"] = messages(3)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


def test_messages_of_a_long_chat_are_counted_where_they_are_parsed(
    server: ServerThread[FakeEngine],
) -> None:
    error = refused(server, "/v1/chat/completions", {"messages": messages(2000)})
    assert error["code"] == "too_many_messages"
    assert "there are 2000 messages" in error["message"]


def test_what_is_stored_of_a_conversation_counts(server: ServerThread[FakeEngine]) -> None:
    first = httpx.post(f"{server.url}/v1/responses", json={"input": messages(2)}).json()
    body = {"input": "x", "previous_response_id": first["id"], "max_tokens": None}
    assert refused(server, "/v1/responses", body)["code"] == "too_many_messages"


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_at_least_one(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{name: 0}).resolve()
