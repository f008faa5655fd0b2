"""Calls the handlers of generation without the framework's layers in between.

The innermost middleware of the app: parameters, dependencies and models that FastAPI would look for
on the way are not there, since these handlers read their bodies themselves. The routes stay in the
app, whose OpenAPI description is made of them. Never answers another path or method.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.server.errors import on_error


class DirectRoutes:
    """Calls what `routers` have for a POST, whose only parameter is the request."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self._app = app
        routes = [one for router in routers for one in router.routes]
        self._routes = {
            route.path: route
            for route in routes
            if isinstance(route, APIRoute) and route.methods == {"POST"}
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if is_post else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as the router would: the access log looks there
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except OctavoError as error:
            response = await on_error(request, error)
        await response(scope, receive, send)
