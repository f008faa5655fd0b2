"""Batches as a client makes them: their lines, their begin, their end and what came of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import openai

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


ENDS = ("completed", "failed", "expired", "cancelled")


def line(id: str, body: dict[str, Any], url: str = TEXT, **more: Any) -> bytes:
    return json.dumps(
        {"custom_id": id, "method": "POST", "url": url, "body": body, **more}
    ).encode()


def prompts(count: int, **body: Any) -> bytes:
    return b"\n".join(
        line(f"id-{i}", {"prompt": f"Line {i}", "max_tokens": 5, **body}) for i in range(count)
    )


def begin(client: openai.OpenAI, content: bytes, endpoint: str = TEXT, **more: Any) -> Any:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        **{"completion_window": "24h", **more},
    )


def ended(client: openai.OpenAI, id: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(id)).status not in ENDS:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(one) for one in client.files.content(file_id).read().splitlines()]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
