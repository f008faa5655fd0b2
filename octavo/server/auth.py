"""API keys: every route asks for one, except those that only say whether the server lives.

A middleware around the whole app, so that a new or an unknown route is closed by default.
Never logs a key, and compares in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready"})


class AuthMiddleware:
    """Answers 401 unless `Authorization: Bearer KEY` holds one of `keys`; none means open.

    Leaves the key in `request.state.api_key` ("" if none is needed), which names the tenant.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        key = ""
        if self._digests and not (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            key = _bearer(Headers(scope=scope).get("authorization", ""))
            if not self._is_known(key):
                await _refuse(scope, receive, send)
                return
        scope.setdefault("state", {})["api_key"] = key
        await self._app(scope, receive, send)

    def _is_known(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode()).digest()
        # All keys are compared, whichever fits: no early end to measure.
        return True in [hmac.compare_digest(digest, known) for known in self._digests]


def tenant_salt(api_key: str, client_salt: str) -> str:
    """Returns the cache salt of a request: the client's, bound to its key if it needs one.

    A client can so separate its own requests, but never reach the blocks of another key.
    """
    if not api_key:
        return client_salt
    return hmac.new(api_key.encode(), client_salt.encode(), hashlib.sha256).hexdigest()


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    message = "send a valid API key in the header Authorization: Bearer KEY"
    headers = {"WWW-Authenticate": "Bearer"}
    error = ApiError(401, message, code="invalid_api_key", headers=headers)
    await error_response(error)(scope, receive, send)
