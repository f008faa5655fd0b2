"""Who asks, and whether they may: the door of the app.

A middleware around the whole app, so that a new or an unknown route is closed by default. Which
scopes a route needs stands in `tenants.route_scopes`, who has them is known to
`tenants.keyring`. Never logs a key.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.config import ServerConfig
from octavo.errors import RequestError
from octavo.server.errors import ApiError, error_response
from octavo.server.tenants import callers
from octavo.server.tenants.budgets import Budgets
from octavo.server.tenants.callers import ANYONE, STRANGER, Caller, caller_of
from octavo.server.tenants.keyring import Keyring
from octavo.server.tenants.route_scopes import COUNTED, RouteScopes

_KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})


class AuthMiddleware:
    """Answers 401 unless `Authorization: Bearer KEY`, or `x-api-key: KEY` where there is no such
    header, holds a known key, and 403 unless that has a scope of the route; without keys, no one
    needs one. 400 where a header holds two keys, 503 for a token whose issuer's keys cannot be had.

    Leaves the Caller in `request.state.caller`.
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        route_scopes: RouteScopes,
        budgets: Budgets | None = None,
    ) -> None:
        """Whoever has used up one of `budgets` is told so before its body is read."""
        self._app = app
        self._budgets = budgets
        self._keyring = keyring
        self._routes = route_scopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        caller: Caller | None = ANYONE
        if not self._keyring.is_open:
            needed = self._routes.needed(scope["path"]) if scope["type"] == "http" else None
            if needed is not None and not needed:
                caller = STRANGER
            else:
                try:
                    caller = await self._keyring.find(_sent_key(scope))
                except ApiError as error:
                    await _refuse(error, scope, receive, send)
                    return
                if caller is None:
                    await _refuse(_unknown_key(), scope, receive, send)
                    return
                if needed is not None and not needed & caller.scopes:
                    error = _missing_scope(scope, needed)
                    await error_response(error, scope)(scope, receive, send)
                    return
                if self._budgets is not None and scope["path"] in COUNTED:
                    try:
                        self._budgets.check(caller.tenant)
                    except ApiError as error:
                        await error_response(error, scope)(scope, receive, send)
                        return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def check_priority(request: Request, priority: int, config: ServerConfig) -> None:
    """Raises RequestError if the client may not ask for `priority`: it would pass others by.
    Those whose tenant has no range of its own may ask for what `config` allows."""
    caller = caller_of(request)
    if priority == 0 and caller.tenant.priorities is None:
        return  # nearly always; every range that `config` may have holds it
    low, high = caller.tenant.priorities or config.priority_range
    if not low <= priority <= high:
        if caller.is_operator and caller is not ANYONE:
            return
        limit = "0" if low == high else f"in {low}..{high}"
        source = "--allow-priority" if caller.tenant.priorities is None else "file of --keys"
        message = f"priority must be {limit}, got {priority}; the server's {source} says so"
        raise RequestError(message, param="priority", code="priority_not_allowed")


def require_scope(request: Request, needed: frozenset[callers.Scope]) -> None:
    """Raises ApiError (403) unless the client has one of the scopes, where the body says what the
    route is to do."""
    if not needed & caller_of(request).scopes:
        raise _missing_scope(request.scope, needed)


def _sent_key(scope: Scope) -> bytes:
    """Returns the key in the headers, in OpenAI's form or else in Anthropic's. Raises ApiError
    (400) if a header tells two: a proxy before us may have judged the other."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _KEY_HEADERS and headers.setdefault(name, value) != value:
            message = f"the header {name.decode()} stands there twice; send one key"
            raise ApiError(400, message, code="ambiguous_key")
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").strip()


def _missing_scope(scope: Scope, needed: frozenset[callers.Scope]) -> ApiError:
    where = f"{scope['method']} {scope['path'][:128]}"
    if needed & callers.TENANT_SCOPES:
        names = " or ".join(sorted(needed))
        message = f"{where} needs a key with the scope {names}; this one has not"
        return ApiError(403, message, code="missing_scope")
    [name] = needed
    message = (
        f"{where} is for the operator alone; send a key of the server's --operator-key, or one "
        f"with the scope {name}"
    )
    return ApiError(403, message, code="operator_only")


def _unknown_key() -> ApiError:
    message = "send a valid API key in the header Authorization: Bearer KEY, or x-api-key: KEY"
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await error_response(error, scope)(scope, receive, send)
