"""What is asked about the server: models, version, the prefix cache.

The cache is the operator's: it is shared by all tenants. Never generates.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.server.body import read_body, require_json
from octavo.server.errors import ApiError
from octavo.server.openapi import described
from octavo.server.protocol.strict import StrictModel
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import json_response

router = APIRouter()


class ResetRequest(StrictModel):
    """Nothing: `{}`, or no body at all."""


@router.get("/v1/models", tags=["OpenAI"], **described("Models"))
async def list_models(request: Request) -> Response:
    """Lists the one model that is served, under each of its names."""
    state = server_state(request)
    cards = [_card(state, name) for name in state.model_names]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model_id:path}", tags=["OpenAI"], **described("Model", statuses=(404,)))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Describes one model."""
    if (
        not model_id
    ):  # the list's path with a slash behind it, which is explained as wrong paths are
        raise HTTPException(404)
    state = server_state(request)
    state.check_model(model_id)
    return json_response(_card(state, model_id))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "octavo",
        "root": state.engine.model_name,
        "max_model_len": state.engine.max_model_len,
    }


@router.get("/version", tags=["Operation"], **described("Version"))
async def version() -> Response:
    """Tells the version of Octavo."""
    return json_response({"version": __version__})


@router.post(
    "/reset_prefix_cache",
    tags=["Operation"],
    **described("Status", ResetRequest, statuses=(409,)),
)
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all cached prefixes, or none (409) while requests hold some; for the operator."""
    require_json(request)
    is_chunked = "transfer-encoding" in request.headers
    if is_chunked or request.headers.get("content-length", "0") != "0":
        await read_body(request, ResetRequest)
    if not await server_state(request).engine.reset_prefix_cache():
        message = (
            "running requests hold cached blocks, so nothing was forgotten; try again when they "
            "are finished"
        )
        raise ApiError(409, message, code="prefix_cache_in_use")
    return json_response({"status": "reset"})
