"""POST /v1/responses: whole, streamed, or in the background.

The body comes to a chat, whose way to the engine it goes; `response_answer` tells what comes back.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import ContextLengthError, RequestError
from octavo.server.answer_wire import wire_of
from octavo.server.body import parsed, read_body
from octavo.server.call import Call
from octavo.server.chat_calls import chat_call
from octavo.server.openapi import described
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_answer import CancelledResponseError, ResponseAnswer, ResponseEvents
from octavo.server.response_run import ResponseRun
from octavo.server.state import server_state
from octavo.server.streaming import long_response, run_attached, stream_response
from octavo.server.tenants.callers import tenant_of
from octavo.server.truncation import fitted
from octavo.tools.answers import AnswerReading

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/responses", **described("Response", ResponsesRequest, streams=True, statuses=(507,))
)
async def create_response(request: Request) -> Response:
    """Answers a text or items of a conversation. Streams server-sent events if `stream` is true."""
    body = await read_body(request, ResponsesRequest)
    state = server_state(request)
    _check_background(body)
    call, reading = await _call(request, body)
    answer = ResponseAnswer(state, body, call, reading)
    run = ResponseRun(request, body, call, answer)
    await run.store()
    wire = wire_of(request.scope)
    if body.background:
        call.exchange.is_going_on = True
        state.responses.spawn(run.take_alone())
        return await long_response(answer.response(), state.drain)
    if body.stream:
        writer = ResponseEvents(answer, body, run.finished)
        return await stream_response(run, writer, request.receive, state.drain, wire)
    with suppress(CancelledResponseError):  # which the response tells
        await run_attached(run.take_all(), request.receive, state.drain, wire)
    return await long_response(answer.response(), state.drain)


def _check_background(body: ResponsesRequest) -> None:
    if not body.background:
        return
    for name, is_wrong in (("stream", body.stream), ("store", body.store is False)):
        if is_wrong:
            message = f"{name}: a response in the background is stored, and asked for later"
            raise RequestError(message, param=name)


async def _call(request: Request, body: ResponsesRequest) -> tuple[Call, AnswerReading | None]:
    whole = await _with_stored(request, body) if body.needs_store else body
    try:
        try:
            return await chat_call(request, whole.chat, "resp_", is_clipped=True)
        except ContextLengthError:
            shorter = body.truncation == "auto" and await fitted(server_state(request), whole)
            if not shorter:
                raise
            return await chat_call(request, shorter.chat, "resp_", is_clipped=True)
    except RequestError as error:
        raise whole.renamed(error) from None


async def _with_stored(request: Request, body: ResponsesRequest) -> ResponsesRequest:
    """Returns the request as its client could have sent it without a store."""
    state = server_state(request)
    state.check_model(body.model)
    body.check()
    max_bytes = state.body_room.max_body_bytes
    before, known = await state.responses.history(
        tenant_of(request), body.previous_response_id, body.references, max_bytes
    )
    # A conversation may have 100,000 items.
    content = await asyncio.to_thread(body.with_items, before, known)
    return await parsed(state, content, ResponsesRequest)
