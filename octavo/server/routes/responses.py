"""POST /v1/responses, whole or streamed.

The body comes to a chat, whose way to the engine it goes; `response_answer` tells what comes back.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.server.answer_wire import AnswerWire
from octavo.server.body import read_body
from octavo.server.chat_calls import chat_call
from octavo.server.generation import Call, StreamedCall, whole_call
from octavo.server.openapi import described
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_answer import ResponseAnswer, ResponseEvents
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import long_response, run_attached, stream_response
from octavo.tools.answers import AnswerReading

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", **described("Response", ResponsesRequest, streams=True))
async def create_response(request: Request) -> Response:
    """Answers a text or items of a conversation. Streams server-sent events if `stream` is true."""
    body = await read_body(request, ResponsesRequest)
    state = server_state(request)
    call, reading = await _call(request, body)
    answer = ResponseAnswer(state, body, call, reading)
    wire = AnswerWire.of(request.scope)
    if body.stream:
        rounds, writer = StreamedCall(state, call), ResponseEvents(answer, body)
        return await stream_response(rounds, writer, request.receive, state.drain, wire)
    by_round = body.includes_logprobs and reading is not None
    work = _take_rounds(state, call, answer) if by_round else _take_whole(state, call, answer)
    await run_attached(work, request.receive, state.drain, wire)
    return await long_response(answer.response(), state.drain)


async def _call(request: Request, body: ResponsesRequest) -> tuple[Call, AnswerReading | None]:
    try:
        return await chat_call(request, body.chat, "resp_", is_clipped=True)
    except RequestError as error:
        raise body.renamed(error) from None


async def _take_whole(state: ServerState, call: Call, answer: ResponseAnswer) -> None:
    [[sequence]] = await whole_call(state, call)
    for _ in answer.take(sequence):
        pass


async def _take_rounds(state: ServerState, call: Call, answer: ResponseAnswer) -> None:
    """As `_take_whole`, where it matters which tokens came with which text."""
    rounds, failure = StreamedCall(state, call), None
    try:
        rounds.begin()
        while not rounds.is_over:
            for _, delta, _ in await rounds.take():
                for _ in answer.take(delta):
                    pass
    except BaseException as error:
        failure = error
        raise
    finally:
        rounds.close(failure)
