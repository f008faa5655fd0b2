"""API keys: who asks (an operator, a tenant, nobody known), and what only operators may.

A middleware around the whole app, so that a new or an unknown route is closed by default; routes
of the operator call `require_operator`. Never logs a key, and compares in constant time.

    no keys                       everyone is the operator
    keys of tenants alone         nobody is the operator
    an operator's keys            whoever sends one; all others need a tenant's key
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from enum import StrEnum

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.config import ServerConfig
from octavo.errors import RequestError
from octavo.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
METRICS_PATHS = frozenset({"/metrics", "/version"})
"""Open as well with `public_metrics`."""
OPERATOR_PATHS = frozenset({"/metrics", "/reset_prefix_cache"})
"""Whose routes call `require_operator`."""
_KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})


class Role(StrEnum):
    """What a client may do: an operator everything, a tenant what does not touch others."""

    OPERATOR = "operator"
    TENANT = "tenant"


class Keyring:
    """The known keys, each with its role."""

    def __init__(self, tenants: Sequence[str], operators: Sequence[str]) -> None:
        self.is_empty = not tenants and not operators
        roles = {Role.TENANT: tenants, Role.OPERATOR: operators}
        self._known = [
            (hashlib.sha256(spelled).digest(), key, role)
            for role, keys in roles.items()
            for key in keys
            for spelled in _spellings(key)
        ]

    def find(self, sent: bytes) -> tuple[str, Role] | None:
        """Returns the key that a client sent, as it was configured, and its role."""
        digest = hashlib.sha256(sent).digest()
        found = None
        # All keys are compared, whichever fits: no early end to measure.
        for known, key, role in self._known:
            if hmac.compare_digest(digest, known):
                found = key, role
        return found


def _spellings(key: str) -> set[bytes]:
    """Returns the bytes of a key in a header: UTF-8 (curl) or Latin-1 (HTTP's old default)."""
    spelled = {key.encode("utf-8", "surrogateescape")}
    if all(ord(char) < 256 for char in key):
        spelled.add(key.encode("latin-1"))
    return spelled


class AuthMiddleware:
    """Answers 401 unless `Authorization: Bearer KEY`, or `x-api-key: KEY` where there is no such
    header, holds a known key; without keys, no one needs one.

    Leaves in `request.state` the `api_key` ("" if none is needed), which names the tenant, and the
    `role` (None on open paths).
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = Keyring(config.api_key, config.operator_key)
        self._open_paths = OPEN_PATHS | (METRICS_PATHS if config.public_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        key, role = "", None
        if self._keys.is_empty:
            role = Role.OPERATOR
        elif not (scope["type"] == "http" and scope["path"] in self._open_paths):
            found = self._keys.find(_sent_key(scope))
            if found is None:
                await _refuse(scope, receive, send)
                return
            key, role = found
        scope.setdefault("state", {}).update(api_key=key, role=role)
        await self._app(scope, receive, send)


def require_operator(request: Request) -> None:
    """Raises ApiError (403) if a tenant asks. (Nobody is asked for a key on open paths.)"""
    if request.state.role is Role.TENANT:
        message = (
            f"{request.method} {request.url.path} is for the operator alone; send a key of the "
            "server's --operator-key"
        )
        raise ApiError(403, message, code="operator_only")


def check_priority(request: Request, priority: int, allowed: tuple[int, int]) -> None:
    """Raises RequestError if the client may not ask for `priority`: it would pass others by."""
    low, high = allowed
    if not low <= priority <= high:
        if request.state.role is Role.OPERATOR and request.state.api_key:
            return
        limit = "0" if low == high else f"in {low}..{high}"
        message = f"priority must be {limit}, got {priority}; the server's --allow-priority says so"
        raise RequestError(message, param="priority", code="priority_not_allowed")


def tenant_salt(api_key: str, client_salt: str) -> str:
    """Returns the cache salt of a request: the client's, bound to its key if it needs one.

    A client can so separate its own requests, but never reach the blocks of another key.
    """
    if not api_key:
        return client_salt
    key = api_key.encode("utf-8", "surrogateescape")
    return hmac.new(key, client_salt.encode(), hashlib.sha256).hexdigest()


def tenant_id(api_key: str) -> str:
    """Returns the name under which stored objects belong to a key: it tells nothing of the key."""
    if not api_key:
        return ""
    key = api_key.encode("utf-8", "surrogateescape")
    return hmac.new(key, b"octavo: owner of stored objects", hashlib.sha256).hexdigest()


def tenant_of(request: Request) -> str:
    """Returns to whom what a request stores belongs."""
    return tenant_id(request.state.api_key)


def _sent_key(scope: Scope) -> bytes:
    """Returns the key in the headers, in OpenAI's form or else in Anthropic's."""
    headers = {name: value for name, value in reversed(scope["headers"]) if name in _KEY_HEADERS}
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").strip()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    message = "send a valid API key in the header Authorization: Bearer KEY, or x-api-key: KEY"
    headers = {"WWW-Authenticate": "Bearer"}
    error = ApiError(401, message, code="invalid_api_key", headers=headers)
    await error_response(error, scope)(scope, receive, send)
