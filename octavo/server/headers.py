"""One header of a request, without an object for all of them.

Called for every request by the middlewares and by `body`. Never changes a scope.
"""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str:
    """Returns the first header `name` (in lower case) of an HTTP scope; empty if it has none."""
    for known, value in scope["headers"]:
        if known == name:
            return value.decode("latin-1")
    return ""
