"""GET, DELETE and cancelling of stored responses, and lists of their input items.

A response is its tenant's: to all others it does not exist.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.server.errors import ApiError
from octavo.server.lists import listed
from octavo.server.openapi import described
from octavo.server.protocol.response_items import listed_items
from octavo.server.protocol.responses import ItemsQuery, RetrieveQuery
from octavo.server.query import read_query
from octavo.server.response_replay import replay
from octavo.server.state import server_state
from octavo.server.streaming import PiecesResponse, json_response
from octavo.server.tenants.callers import tenant_of

router = APIRouter(tags=["OpenAI"])


@router.get(
    "/v1/responses/{response_id}",
    **described("Response", query=RetrieveQuery, statuses=(400, 404)),
)
async def retrieve_response(request: Request, response_id: str) -> Response:
    """Returns a stored response, or its events if `stream` is true: one that is being made is
    waited for."""
    query = read_query(request, RetrieveQuery)
    after = -1 if query.starting_after is None else query.starting_after
    if query.starting_after is not None and (after < 0 or query.stream != "true"):
        message = f"starting_after is {after}: it must be at least 0, and needs stream=true"
        raise RequestError(message, param="starting_after")
    state, tenant = server_state(request), tenant_of(request)
    stored = await state.responses.get(tenant, response_id)
    if query.stream == "true":
        look = partial(state.responses.get, tenant, response_id)
        events = replay(stored, look, after)
        return PiecesResponse(await anext(events), events, state.drain, "text/event-stream")
    return Response(bytes(stored.response), media_type="application/json")


@router.delete("/v1/responses/{response_id}", **described("ResponseDeleted", statuses=(404,)))
async def delete_response(request: Request, response_id: str) -> Response:
    """Removes a stored response; one that is being made ends."""
    await server_state(request).responses.delete(tenant_of(request), response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", **described("Response", statuses=(404, 409)))
async def cancel_response(request: Request, response_id: str) -> Response:
    """Ends a stored response that is being made."""
    stored = await server_state(request).responses.cancel(tenant_of(request), response_id)
    return Response(bytes(stored.response), media_type="application/json")


@router.get(
    "/v1/responses/{response_id}/input_items",
    **described("ResponseItems", query=ItemsQuery, statuses=(400, 404)),
)
async def list_input_items(request: Request, response_id: str) -> Response:
    """Lists the input items of a stored response, without those of responses before it."""
    query = read_query(request, ItemsQuery)
    stored = await server_state(request).responses.get(tenant_of(request), response_id)
    # An input may have 100,000 items.
    return json_response(await asyncio.to_thread(_page, bytes(stored.items), response_id, query))


def _page(items_json: bytes, response_id: str, query: ItemsQuery) -> dict[str, Any]:
    items = listed_items(msgspec.json.decode(items_json), response_id.removeprefix("resp_"))
    if query.order == "desc":
        items.reverse()
    places = {item["id"]: place for place, item in enumerate(items)}
    if query.after is not None and query.after not in places:
        message = f"after: the response has no input item {query.after!r}"
        raise ApiError(404, message, code="item_not_found", param="after")
    first = 0 if query.after is None else places[query.after] + 1
    last = first + query.limit
    return listed(items[first:last], len(items) > last)
