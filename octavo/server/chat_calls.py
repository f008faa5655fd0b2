"""From a chat's body to its call: text, tokens, what its answers are held to and how they are read.

Called by the routes of chats and of the APIs that are made chats. Never formats an answer.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from msgspec import structs
from starlette.requests import Request

from octavo.engine.held_answers import held_params
from octavo.request import SamplingParams
from octavo.server.asked_params import asked_params
from octavo.server.call import Call
from octavo.server.chat_answers import chat_reading
from octavo.server.generation import new_call
from octavo.server.guards.inputs import checked_chat
from octavo.server.limits import check_messages
from octavo.server.protocol.chat import ChatRequest
from octavo.server.state import server_state
from octavo.server.tokenising import render
from octavo.tools.answers import AnswerReading, within_budget
from octavo.tools.reasoning_tokens import NO_THOUGHT


async def chat_call(
    request: Request,
    body: ChatRequest,
    kind: str,
    *,
    is_clipped: bool = False,
    thinking_budget: int | None = None,
) -> tuple[Call, AnswerReading | None]:
    """Returns the call that `body` asks for, and how its answers are read; `kind` is as in
    `new_call`. With `is_clipped`, `max_tokens` is no more than the context has left.
    `thinking_budget` bounds the reasoning where the model can be held to it.

    Raises RequestError, ApiError, OverloadedError, before anything runs."""
    state = server_state(request)
    state.check_model(body.model)
    state.engine.check_generates()
    check_messages(body.num_messages, state.config.max_messages)
    params = await asked_params(body, state.engine.default_sampling_params)
    if state.guard is not None:
        body = await checked_chat(request, body, state.guard)
        # Nor is a long chat rendered where it was parsed, then.
        body = await asyncio.to_thread(body.with_rendered, state.engine.tokenizer.chat_renderer)
    rendered = body.rendered or render(state.engine.tokenizer, body)
    reading = chat_reading(body, state.engine.answer_format, rendered)
    reading = within_budget(reading, body.thinking_token_budget)
    params = held_params(params, body.tool_set(), reading)
    marks = None if reading is None else reading.marks.by_id
    thought = NO_THOUGHT if reading is None else reading.thought
    if thought.ends and thought.budget is None:
        thought = replace(thought, budget=thinking_budget)
    began = time.monotonic()
    prompt = await state.tokenising.encode_rendered(rendered)
    request.scope["state"]["exchange"].tokenising = (began, time.monotonic())
    if is_clipped:
        params = _within(params, state.engine.max_model_len - len(prompt))
    return await new_call(request, body, kind, params, [prompt], marks, thought), reading


def _within(params: SamplingParams, room: int) -> SamplingParams:
    """Returns parameters with at most `room` tokens, if there is room for any."""
    if params.max_tokens is None or not 1 <= room < params.max_tokens:
        return params
    return structs.replace(params, max_tokens=room)
