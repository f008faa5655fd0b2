"""The live page at `/` and what it and `octavo top` show: GET /live, for the operator.

The page itself tells nothing: it is the same for everybody, and asks for a key where there are
keys. Never waits for the engine longer than a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib import resources
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.kv_cache.plan_text import describe, describe_groups
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import STEP_SECONDS_BUCKETS
from octavo.server.errors import ApiError
from octavo.server.state import server_state
from octavo.server.streaming import json_response

router = APIRouter(include_in_schema=False)

LIVE_SECONDS = 2.0
"""How long an engine may take to tell of itself."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_FILES = {"/": "live.html", "/live.css": "live.css", "/live.js": "live.js"}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    content = resources.files("octavo.server").joinpath("page", name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]

    async def page() -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return page


for _path, _name in _FILES.items():
    router.add_api_route(_path, _page(_name), methods=["GET"], response_model=None)


@router.get("/live", response_model=None)
async def live(request: Request) -> Response:
    """Tells how the server does now; of single experts with `experts=true`. For the operator."""
    state = server_state(request)
    try:
        stats = await asyncio.wait_for(state.engine.stats(is_detailed=True), LIVE_SECONDS)
    except TimeoutError as error:
        message = f"the engine has not told of itself for {LIVE_SECONDS:g} seconds; ask again"
        raise ApiError(503, message, code="engine_busy") from error
    if request.query_params.get("experts") != "true":
        stats = replace(stats, expert_counts=())
    plan = state.engine.plan
    return json_response(
        {
            "time": time.time(),
            "version": __version__,
            "model": state.model_name,
            "uptime_seconds": int(time.time()) - state.started_at,
            "engine": stats,
            "step_seconds_buckets": STEP_SECONDS_BUCKETS,
            "plan": None if plan is None else _plan(plan),
        }
    )


def _plan(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "weights_bytes": plan.weights_bytes,
        "activation_bytes": plan.activation_bytes,
        "graph_bytes": plan.graph_bytes,
        "kv_bytes": plan.kv_bytes,
        "total_bytes": plan.total_bytes,
        "usable_bytes": plan.usable_bytes,
        "text": f"{describe(plan)}\n{describe_groups(plan)}",
    }
