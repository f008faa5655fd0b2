"""POST /v1/chat/completions/render and POST /v1/completions/render: prompts as tokens.

Asks the tokenizer alone; never reaches the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.asked_params import asked_params
from octavo.server.body import read_body
from octavo.server.check_params import check_params
from octavo.server.openapi import described
from octavo.server.pieces import Lazy
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.state import server_state
from octavo.server.streaming import long_response
from octavo.server.tokenising import completion_ids, render

router = APIRouter(tags=["Tokens"])


@router.post("/v1/chat/completions/render", **described("RenderedPrompt", ChatRequest))
async def render_chat(request: Request) -> Response:
    """Returns the prompt that a chat's messages and tools become, as text and token ids."""
    body = await read_body(request, ChatRequest)
    state = server_state(request)
    state.check_model(body.model)
    params = await asked_params(body, state.engine.default_sampling_params)
    check_params(request, body, params)
    rendered = body.rendered or render(state.engine.tokenizer, body)
    ids = await state.tokenising.encode_rendered(rendered)
    return await long_response({"text": rendered.shown, **_ids(ids)}, state.drain)


@router.post("/v1/completions/render", **described("RenderedPrompts", CompletionRequest))
async def render_completion(request: Request) -> Response:
    """Returns each prompt of a completion as token ids."""
    body = await read_body(request, CompletionRequest)
    state = server_state(request)
    state.check_model(body.model)
    params = await asked_params(body, state.engine.default_sampling_params)
    check_params(request, body, params)
    prompts = await completion_ids(state.tokenising, body)

    def data() -> Iterator[dict[str, Any]]:
        yield from map(_ids, prompts)

    return await long_response({"object": "list", "data": Lazy(data())}, state.drain)


def _ids(ids: Sequence[int]) -> dict[str, Any]:
    return {"num_tokens": len(ids), "token_ids": Lazy(ids, batch=4096)}
