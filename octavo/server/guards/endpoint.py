"""A guard behind HTTP: a POST of the check as JSON, a verdict as JSON.

    {"stage": "input", "texts": [{"role", "place", "text", "is_fixed"}], "request_id", "route",
     "model", "tenant", "key", "index", "before", "is_last"}
    -> {"action": "allow"} | {"action": "refuse", "reason": ""} | {"action": "rewrite", "texts": []}

Made by `load`. Owns the connections; time and number of checks are bounded by `gate`.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec

from octavo.guard import GuardCheck, Refuse, Rewrite, Verdict
from octavo.server.guards.gate import GuardError

MAX_ANSWER_BYTES = 16 * 2**20
_encode = msgspec.json.Encoder().encode


class _Answer(msgspec.Struct, frozen=True):
    action: str
    reason: str = ""
    texts: list[str] | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class Endpoint:
    """Asks one URL. Use it from one event loop."""

    def __init__(self, url: str, max_connections: int) -> None:
        self._url = url
        self._max_connections = max_connections
        self._client: httpx.AsyncClient | None = None

    async def __call__(self, check: GuardCheck) -> Verdict:
        """Returns the verdict. Raises GuardError."""
        try:
            return _verdict(await self._answer(_encoded(check)))
        except httpx.HTTPError as error:
            raise GuardError(f"{type(error).__name__}: {error}") from error

    async def _answer(self, check: bytes) -> bytes:
        headers = {"content-type": "application/json"}
        content = bytearray()
        async with self._connected().stream(
            "POST", self._url, content=check, headers=headers
        ) as answer:
            if answer.status_code != 200:
                raise GuardError(f"{self._url} answered {answer.status_code}")
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise GuardError(f"{self._url} answered more than {MAX_ANSWER_BYTES} bytes")
        return bytes(content)

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            most = self._max_connections
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
            # The gate has the only clock. No proxy of the environment comes between.
            self._client = httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def _encoded(check: GuardCheck) -> bytes:
    """Returns a check as JSON. Halves of characters that a client has spelled become "?": a text
    that could not be sent would count as a guard that fails, and may be let through then."""
    try:
        return _encode(check)
    except UnicodeEncodeError:
        told = json.dumps(msgspec.to_builtins(check), ensure_ascii=False)
        return told.encode("utf-8", "replace")


def _verdict(content: bytes) -> Verdict:
    try:
        found: Any = _decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GuardError(f"its answer is no verdict: {error}") from error
    if found.action == "allow":
        return None
    if found.action == "refuse":
        return Refuse(found.reason)
    if found.action == "rewrite" and found.texts is not None:
        return Rewrite(found.texts)
    message = "action must be allow, refuse, or rewrite with texts"
    raise GuardError(f"its answer is no verdict: {message}")
