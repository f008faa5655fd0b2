"""Calls the handlers of generation without the framework's layers in between.

`App` is what the server serves: a FastAPI whose requests for these handlers pass its middlewares
and nothing else. Parameters, dependencies and models that FastAPI would look for on the way are not
there, since these handlers read their bodies themselves. The routes stay in the app, whose OpenAPI
description is made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.errors import ConfigError, OctavoError
from octavo.server.errors import on_error


class App(FastAPI):
    """The application, with a short way to its direct routes."""

    def __init__(
        self,
        middleware: Sequence[Middleware],
        direct: Iterable[APIRouter],
        prefix: str = "",
        **options: Any,
    ) -> None:
        """A POST to a route of `direct`, whose only parameter is the request, takes the short
        way. Paths below `prefix` are those of the routes, whether or not a proxy has taken it
        away. `options` are FastAPI's."""
        super().__init__(middleware=middleware, **options)
        self._prefix = prefix
        self._routes = {
            route.path: route
            for router in direct
            for route in router.routes
            if isinstance(route, APIRoute) and route.methods == {"POST"}
        }
        self._short_way: ASGIApp = self._call_route
        for layer in reversed(middleware):
            self._short_way = layer.cls(self._short_way, *layer.args, **layer.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._prefix:
            scope = _without(self._prefix, scope)
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if is_post and scope["path"] in self._routes:
            scope["app"] = self  # as Starlette would
            await self._short_way(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _call_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes[scope["path"]]
        scope["route"] = route  # as the router would: the access log looks there
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except OctavoError as error:
            response = await on_error(request, error)
        await response(scope, receive, send)


def check_prefix(prefix: str, paths: Iterable[str]) -> None:
    """Raises ConfigError if a prefix begins one of the paths: a proxy that takes it away, and one
    that does not, could not be told apart."""
    hidden = prefix and next((one for one in paths if f"{one}/".startswith(f"{prefix}/")), None)
    if hidden:
        message = f"root_path {prefix} begins {hidden}, a route of ours; take another, like /llm"
        raise ConfigError(message, field="root_path")


def _without(prefix: str, scope: Scope) -> Scope:
    """Returns the scope of a request without the prefix of its path: all that looks at paths, the
    scopes of keys first, sees those of the routes."""
    path = scope.get("path", "")
    if not path.startswith(f"{prefix}/"):
        return scope
    raw = scope.get("raw_path", b"").removeprefix(prefix.encode())
    return {**scope, "path": path[len(prefix) :], "raw_path": raw}
