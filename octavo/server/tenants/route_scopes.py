"""Which scopes let a caller in where: the one table of all routes.

`check` is called by `create_app`: an app with a route that is not here does not start. Methods are
not told apart: whoever may ask for a path may use every method that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastapi import APIRouter, FastAPI
from starlette.routing import Route, compile_path

from octavo.server.tenants.callers import ALL_SCOPES, TENANT_SCOPES, Scope

OPEN = frozenset[Scope]()
"""Needs no key."""
_ANY = ALL_SCOPES
_TEXTS = frozenset({Scope.GENERATE})
_VECTORS = frozenset({Scope.EMBED})
_EITHER = TENANT_SCOPES
_NUMBERS = frozenset({Scope.METRICS})
_OPERATION = frozenset({Scope.OPERATE})

ROUTE_SCOPES: Mapping[str, frozenset[Scope]] = {
    **dict.fromkeys(("/health", "/ready", "/ping"), OPEN),
    **dict.fromkeys(("/", "/live.css", "/live.js"), OPEN),  # the page itself tells nothing
    **dict.fromkeys(("/docs", "/openapi.json", "/version"), _ANY),
    **dict.fromkeys(("/v1/models", "/v1/models/{model_id:path}"), _ANY),
    **dict.fromkeys(("/v1/chat/completions", "/v1/chat/completions/render"), _TEXTS),
    **dict.fromkeys(("/v1/completions", "/v1/completions/render"), _TEXTS),
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/explain"), _TEXTS),
    "/v1/responses": _TEXTS,
    "/v1/responses/{response_id}": _TEXTS,
    "/v1/responses/{response_id}/cancel": _TEXTS,
    "/v1/responses/{response_id}/input_items": _TEXTS,
    "/v1/cache/explain": _TEXTS,
    "/invocations": _TEXTS,
    **dict.fromkeys(("/v1/embeddings", "/pooling"), _VECTORS),
    **dict.fromkeys(("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"), _VECTORS),
    **dict.fromkeys(("/tokenize", "/detokenize"), _EITHER),
    "/v1/files": _EITHER,
    "/v1/files/{file_id}": _EITHER,
    "/v1/files/{file_id}/content": _EITHER,
    "/v1/batches": _EITHER,  # and one of the lines' endpoint
    "/v1/batches/{batch_id}": _EITHER,
    "/v1/batches/{batch_id}/cancel": _EITHER,
    "/metrics": _NUMBERS,
    "/live": _OPERATION,
    "/reset_prefix_cache": _OPERATION,
}
"""By path template: a caller needs one of the scopes; OPEN routes need no caller."""
COUNTED = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"),
        *("/v1/embeddings", "/pooling", "/v1/score", "/score", "/invocations"),
        *("/v1/rerank", "/v2/rerank", "/rerank"),
    }
)
"""A POST to these is a request of a tenant's budget."""
PUBLIC_METRICS = frozenset({"/metrics", "/version"})
"""Open as well with `--public-metrics`."""


class RouteScopes:
    """The table as requests are looked up in it."""

    def __init__(self, public_metrics: bool = False) -> None:
        opened = PUBLIC_METRICS if public_metrics else frozenset()
        table = {path: OPEN if path in opened else one for path, one in ROUTE_SCOPES.items()}
        self._plain = {path: one for path, one in table.items() if "{" not in path}
        # As the router matches, plain paths too: it takes a line's end behind one for the path.
        self._patterns = [(compile_path(path)[0], path, one) for path, one in table.items()]

    def needed(self, path: str) -> frozenset[Scope]:
        """Returns the scopes of which a path needs one. One that no route has needs any: whoever
        has a key is told that it is not there."""
        found = self._plain.get(path)
        if found is not None:
            return found
        for pattern, _, scopes in self._patterns:
            if pattern.match(path):
                return scopes
        return _ANY

    def template(self, path: str) -> str:
        """Returns the route of a path as the table has it; "none" for one that no route has."""
        found = (template for pattern, template, _ in self._patterns if pattern.match(path))
        return path if path in self._plain else next(found, "none")

    def is_open(self, path: str) -> bool:
        return not self.needed(path)


def paths_of(app: FastAPI, routers: Sequence[APIRouter]) -> set[str]:
    """Returns the path templates of an app that includes `routers`. Raises RuntimeError if there
    is something else in it, whose paths nobody knows."""
    own = [route for route in app.routes if isinstance(route, Route)]
    if len(app.routes) != len(own) + len(routers):
        raise RuntimeError("the app has routes that are neither its own nor of its routers")
    included = [route for router in routers for route in router.routes]
    return {route.path for route in (*own, *included) if isinstance(route, Route)}


def check(paths: Iterable[str]) -> None:
    """Raises RuntimeError if a path is not in the table: it would let everyone with a key in."""
    for path in paths:
        if path not in ROUTE_SCOPES:
            raise RuntimeError(f"route {path} has no scopes; give it a row in ROUTE_SCOPES")


def scopes_of(path: str) -> frozenset[Scope]:
    """Returns the scopes of a route without parameters."""
    return ROUTE_SCOPES[path]
