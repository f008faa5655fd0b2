"""POST /v1/messages, whole or streamed, and POST /v1/messages/count_tokens: Anthropic's API.

Parses, goes the way of a chat, formats. Never holds state between requests.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answer_wire import wire_of
from octavo.server.body import read_body
from octavo.server.chat_calls import chat_call
from octavo.server.generation import StreamedCall, whole_call
from octavo.server.message_answers import MessageEvents, MessageHead, whole_message
from octavo.server.openapi import described
from octavo.server.protocol.messages import CountTokensRequest, MessagesRequest
from octavo.server.state import server_state
from octavo.server.streaming import json_response, run_attached, stream_response

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", **described("Message", MessagesRequest, streams=True))
async def create_message(request: Request) -> Response:
    """Answers messages. Streams server-sent events if `stream` is true."""
    body = await read_body(request, MessagesRequest)
    state = server_state(request)
    # Agents ask for the same number of tokens whatever the length of the prompt.
    call, reading = await chat_call(
        request, body.chat(), "msg_", is_clipped=True, thinking_budget=body.thinking_budget
    )
    head = MessageHead(
        call=call,
        model=state.model_name,
        reading=reading,
        hides_thinking=body.hides_thinking,
        max_tokens=body.max_tokens,
    )
    wire = wire_of(request.scope)
    if body.stream:
        rounds, writer = StreamedCall(state, call), MessageEvents(head)
        return await stream_response(rounds, writer, request.receive, state.drain, wire)
    work = whole_call(state, call)
    [[sequence]] = await run_attached(work, request.receive, state.drain, wire)
    return json_response(whole_message(head, sequence))


@router.post("/v1/messages/count_tokens", **described("TokenCount", CountTokensRequest))
async def count_tokens(request: Request) -> Response:
    """Tells how many tokens a message's prompt has, template and tools included."""
    body = await read_body(request, CountTokensRequest)
    state = server_state(request)
    state.check_model(body.model)
    prompt = await state.tokenising.encode_chat(body.chat())
    return json_response({"input_tokens": len(prompt)})
