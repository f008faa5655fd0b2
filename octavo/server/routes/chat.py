"""POST /v1/chat/completions, whole or streamed.

Parses, asks the engine through `generation`, formats. Never holds state between requests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.request import CompletionOutput, RequestOutput
from octavo.server.answers import ChunkFrame, Cursor, chat_logprobs, prompt_logprobs_of, usage_of
from octavo.server.body import read_body
from octavo.server.generation import Call, final_outputs, new_call, run_call
from octavo.server.openapi import body_of
from octavo.server.protocol.chat import ChatRequest
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import json_response, run_attached, stream_response

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None, openapi_extra=body_of(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answers messages. Streams server-sent events if `stream` is true."""
    body = await read_body(request, ChatRequest)
    state = server_state(request)
    state.check_model(body.model)
    params = body.to_params(state.engine.default_sampling_params)
    prompt = await state.tokenising.encode_chat(body)
    call = new_call(request, body, "chatcmpl", params, [prompt])
    if body.stream:
        return await stream_response(_chunks(state, body, call), request.receive, state.drain)
    work = final_outputs(state, call)
    [output] = await run_attached(work, request.receive, state.drain)
    return json_response(_answer(state, body, call, output))


def _answer(
    state: ServerState, body: ChatRequest, call: Call, output: RequestOutput
) -> dict[str, Any]:
    answer = {
        "id": call.id,
        "object": "chat.completion",
        "created": call.created,
        "model": state.model_name,
        "choices": [_choice(state, body, sequence) for sequence in output.outputs],
        "usage": usage_of([output]),
    }
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs_of(output, state.engine.tokenizer)
    if body.return_token_ids:
        answer["prompt_token_ids"] = output.prompt_token_ids
    return answer


def _choice(state: ServerState, body: ChatRequest, sequence: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if body.logprobs:
        positions, num_top = sequence.logprobs or [], body.top_logprobs or 0
        logprobs = chat_logprobs(positions, num_top, state.engine.tokenizer)
    choice = {
        "index": sequence.index,
        "message": {
            "role": "assistant",
            "content": body.echoed_text() + sequence.text,
            "refusal": None,
        },
        "logprobs": logprobs,
        "finish_reason": sequence.finish_reason,
        "stop_reason": sequence.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = sequence.token_ids
    return choice


async def _chunks(
    state: ServerState, body: ChatRequest, call: Call
) -> AsyncGenerator[dict[str, Any], None]:
    frame = ChunkFrame(call, body, kind="chat.completion.chunk", model=state.model_name)
    cursors = [Cursor() for _ in range(call.params.n)]
    newest: list[RequestOutput] = []
    async with aclosing(run_call(state, call)) as outputs:
        async for _, output in outputs:
            is_first, newest = not newest, [output]
            if is_first:
                for index in range(call.params.n):
                    delta = {"role": "assistant", "content": body.echoed_text()}
                    chunk = frame.chunk(_stream_choice(index, delta), newest)
                    if body.return_token_ids:
                        chunk["prompt_token_ids"] = output.prompt_token_ids
                    yield chunk
            for sequence in output.outputs:
                for choice in _new_choices(state, body, cursors[sequence.index], sequence):
                    yield frame.chunk(choice, newest)
    if body.includes_usage:
        yield frame.usage_chunk(newest)


def _new_choices(
    state: ServerState, body: ChatRequest, cursor: Cursor, sequence: CompletionOutput
) -> Iterator[dict[str, Any]]:
    """Yields a choice for what is new, and one for the end."""
    if cursor.is_finished:
        return
    new = cursor.advance(sequence)
    if new.text or new.logprobs or (new.token_ids and body.return_token_ids):
        choice = _stream_choice(sequence.index, {"content": new.text})
        if body.logprobs:
            num_top = body.top_logprobs or 0
            choice["logprobs"] = chat_logprobs(new.logprobs, num_top, state.engine.tokenizer)
        if body.return_token_ids:
            choice["token_ids"] = new.token_ids
        yield choice
    if sequence.finish_reason is not None:
        cursor.is_finished = True
        end = {"finish_reason": sequence.finish_reason, "stop_reason": sequence.stop_reason}
        yield {**_stream_choice(sequence.index, {}), **end}


def _stream_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
