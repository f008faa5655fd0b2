"""OpenAI's client, refusing every answer that its types do not allow; and refusals."""

from __future__ import annotations

from typing import Any

import httpx
import openai


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    )


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]
