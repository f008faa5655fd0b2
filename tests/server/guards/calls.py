"""Calls of a server with a guard."""

from __future__ import annotations

from typing import Any

import httpx

MODULE = "tests.server.guards.judges"


def chat(server: Any, content: Any = "hi", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body)


def complete(server: Any, prompt: Any = "hi", **fields: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 50, **fields}
    )
