"""What operators ask: models, health, readiness, version, metrics, the prefix cache.

Never generates.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from octavo import __version__
from octavo.errors import EngineDeadError
from octavo.server.errors import ApiError
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import json_response

router = APIRouter()


@router.get("/v1/models", tags=["OpenAI"], response_model=None)
async def list_models(request: Request) -> Response:
    """Lists the one model that is served, under each of its names."""
    state = server_state(request)
    cards = [_card(state, name) for name in state.model_names]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model_id:path}", tags=["OpenAI"], response_model=None)
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Describes one model."""
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


@router.get("/health", tags=["Operation"], response_model=None)
async def health(request: Request) -> Response:
    """200 while the engine lives, else 503. Needs no key."""
    await server_state(request).engine.check_health()
    return json_response({"status": "ok"})


@router.get("/ready", tags=["Operation"], response_model=None)
async def ready(request: Request) -> Response:
    """200 while requests are taken: the model is loaded, the server does not shut down."""
    state = server_state(request)
    if state.drain.is_draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    if not state.engine.is_ready:
        raise ApiError(503, "the model is not loaded yet", code="not_ready")
    await state.engine.check_health()
    return json_response({"status": "ready"})


@router.get("/version", tags=["Operation"], response_model=None)
async def version() -> Response:
    """Tells the version of Octavo."""
    return json_response({"version": __version__})


@router.get("/metrics", tags=["Operation"], response_model=None)
async def metrics(request: Request) -> Response:
    """Tells all numbers in Prometheus' text format."""
    state = server_state(request)
    try:
        stats = await state.engine.stats()
    except EngineDeadError:
        stats = None  # The last numbers stay: they tell how it was when the engine died.
    # In a thread: thousands of expert series must not hold up the streams.
    text = await asyncio.to_thread(state.metrics.render, stats)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.post("/reset_prefix_cache", tags=["Operation"], response_model=None)
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all cached prefixes; 409 while running requests hold some."""
    if not await server_state(request).engine.reset_prefix_cache():
        message = "running requests hold cached blocks; try again when they are finished"
        raise ApiError(409, message, code="prefix_cache_in_use")
    return json_response({"status": "reset"})


@router.get("/", include_in_schema=False, response_model=None)
async def root() -> Response:
    """Leads to the description of the API."""
    return RedirectResponse("/docs")
