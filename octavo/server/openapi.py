"""What the description of the API says of bodies, made from the protocol's models.

Called by the routes, which read their bodies themselves; never reads a request.
"""

from __future__ import annotations

from typing import Any

from octavo.server.protocol.strict import StrictModel


def body_of(model: type[StrictModel]) -> dict[str, Any]:
    """Returns a route's `openapi_extra` that says its body is a `model`."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
