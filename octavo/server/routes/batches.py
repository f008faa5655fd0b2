"""POST and GET of /v1/batches: files of requests that are run below all others.

Only keeps and tells: the work is `batches.runner`'s, in whichever process.
"""

from __future__ import annotations

import secrets

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError, shown
from octavo.server.auth import require_scope
from octavo.server.batches import records
from octavo.server.batches.records import Batch
from octavo.server.body import read_body
from octavo.server.errors import ApiError
from octavo.server.lists import listed
from octavo.server.openapi import described
from octavo.server.protocol.batches import BatchRequest
from octavo.server.protocol.files import ListQuery
from octavo.server.query import read_query
from octavo.server.state import server_state
from octavo.server.store import objects
from octavo.server.store.bounds import Kind
from octavo.server.store.objects import Part
from octavo.server.streaming import json_response
from octavo.server.tenants.callers import tenant_of
from octavo.server.tenants.route_scopes import scopes_of

router = APIRouter(tags=["Batches"])


@router.post("/v1/batches", **described("Batch", BatchRequest, statuses=(507,)))
async def create_batch(request: Request) -> Response:
    """Begins a batch: each line of a file is a request, run when others leave room."""
    body = await read_body(request, BatchRequest)
    state, tenant = server_state(request), tenant_of(request)
    if body.endpoint not in state.batch_handlers:
        served = ", ".join(state.batch_handlers)
        message = f"endpoint must be one of {served}, got {shown(body.endpoint)}"
        raise RequestError(message, param="endpoint", code="invalid_value")
    require_scope(request, scopes_of(body.endpoint))
    store, seconds = state.store, body.window_seconds()
    now = int(store.clock())
    expiry = body.output_expires_after
    batch = Batch(
        id=f"batch_{secrets.token_hex(12)}",
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + seconds,
        model=state.model_name,
        metadata=body.metadata,
        output_expiry_seconds=None if expiry is None else expiry.seconds,
    )
    await store.run(lambda db: records.create(db, store.bounds, tenant, batch))
    state.batch_news.set()
    return json_response(batch.answer())


@router.get("/v1/batches", **described("Batches", query=ListQuery, statuses=(400, 404)))
async def list_batches(request: Request) -> Response:
    """Lists batches, the newest first."""
    query, tenant = read_query(request, ListQuery), tenant_of(request)
    store = server_state(request).store
    now, part = store.clock(), Part(limit=query.limit, after=query.after)
    page = await store.run(lambda db: objects.page(db, Kind.BATCH, tenant, now, part))
    if page is None:
        raise _no_batch(query.after or "", "after")
    bodies = [body for _, body in page.objects]
    found = await store.run(lambda db: records.counted(db, bodies))
    return json_response(listed([batch.answer() for batch in found], page.has_more))


@router.get("/v1/batches/{batch_id}", **described("Batch", statuses=(404,)))
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """Tells how far a batch is."""
    store, tenant = server_state(request).store, tenant_of(request)
    now = store.clock()
    batch = await store.run(lambda db: records.read(db, tenant, batch_id, now))
    if batch is None:
        raise _no_batch(batch_id)
    return json_response(batch.answer())


@router.post("/v1/batches/{batch_id}/cancel", **described("Batch", statuses=(404, 409)))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Ends a batch with what is done by now; one that is over cannot be (409)."""
    state, tenant = server_state(request), tenant_of(request)
    store, now = state.store, state.store.clock()
    batch = await store.run(lambda db: records.cancel(db, tenant, batch_id, now))
    if batch is None:
        raise _no_batch(batch_id)
    state.batch_news.set()
    return json_response(batch.answer())


def _no_batch(id: str, param: str = "batch_id") -> ApiError:
    message = f"there is no batch {shown(id)}; GET /v1/batches lists yours"
    return ApiError(404, message, code="batch_not_found", param=param)
