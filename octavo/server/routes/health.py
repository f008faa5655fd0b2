"""What probes and scrapers ask: health, readiness, metrics.

Metrics are the operator's: they tell of all tenants. Never waits for the engine
longer than a moment: these are asked most when it does not answer.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from octavo.errors import EngineDeadError
from octavo.server.drain import shutting_down
from octavo.server.errors import ApiError
from octavo.server.openapi import described
from octavo.server.state import server_state
from octavo.server.streaming import json_response

router = APIRouter(tags=["Operation"])

STATS_SECONDS = 0.5
"""How long a scrape waits for new numbers of the engine before it shows the last ones."""


@router.head("/ping", include_in_schema=False, response_model=None)
@router.head("/health", include_in_schema=False, response_model=None)
@router.get("/ping", **described("Status"))
@router.get("/health", **described("Status"))
async def health(request: Request) -> Response:
    """200 while the engine lives, else 503 with the reason. Needs no key."""
    await server_state(request).engine.check_health()
    return json_response({"status": "ok"})


@router.head("/ready", include_in_schema=False, response_model=None)
@router.get("/ready", **described("Status"))
async def ready(request: Request) -> Response:
    """200 while requests are taken: the model is loaded, the server does not shut down."""
    state = server_state(request)
    await state.engine.check_health()
    if state.drain.is_draining:
        raise shutting_down()
    if not state.engine.is_ready:
        raise ApiError(503, "the model is not loaded yet", code="not_ready")
    return json_response({"status": "ready"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Tells all numbers in Prometheus' text format; for the operator."""
    state = server_state(request)
    try:
        asked = state.engine.stats(is_detailed=state.config.expert_metrics)
        stats = await asyncio.wait_for(asked, STATS_SECONDS)
    except (EngineDeadError, TimeoutError):
        stats = None  # The last numbers stay: they tell how it was when the engine fell silent.
    siblings = await state.siblings()
    # In a thread: thousands of expert series must not hold up the streams.
    text = await asyncio.to_thread(state.metrics.render, stats, siblings)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
