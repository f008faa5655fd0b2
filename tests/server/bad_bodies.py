"""Bodies of calls, and the errors that bad ones get."""

from __future__ import annotations

from typing import Any

import httpx

USER = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


def least_body(path: str) -> dict[str, Any]:
    return {"messages": USER} if path == CHAT else {"prompt": "Hello"}
