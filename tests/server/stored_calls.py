"""Calls of a server that stores responses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai

from tests.server.conftest import ServerThread

PATH = "/v1/responses"
KEYS = ("key-a", "key-b")


def client_of(server: ServerThread[Any], key: str = "key-a") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    )


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(client: openai.OpenAI, text: Any = "Hi", **more: Any) -> Any:
    return client.responses.create(model="fake", input=text, **more)


UNKNOWN = "resp_" + "0" * 32
