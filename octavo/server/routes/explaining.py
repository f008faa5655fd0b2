"""POST /v1/cache/explain and POST /v1/messages/explain: what of a prompt is cached now, and why not
more.

Parses and asks the engine, for the tenant's own prompts alone. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.server.asked_params import asked_params
from octavo.server.body import read_body
from octavo.server.check_params import check_params
from octavo.server.openapi import described
from octavo.server.prefix_answers import explanation_body
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.explaining import ExplainRequest
from octavo.server.protocol.messages import MessagesRequest
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.protocol.strict import StrictModel
from octavo.server.state import server_state
from octavo.server.streaming import json_response
from octavo.server.tenants.callers import caller_of
from octavo.server.tokenising import completion_ids

router = APIRouter(tags=["Tokens"])


@router.post("/v1/cache/explain", **described("PrefixExplanation", ExplainRequest))
async def explain(request: Request) -> Response:
    """Tells how much of a chat's or a completion's prompt is cached, where it parts, and why."""
    body: StrictModel = await read_body(request, ExplainRequest)
    state = server_state(request)
    if isinstance(body, ChatRequest):
        params = await asked_params(body, state.engine.default_sampling_params)
        ids = await state.tokenising.encode_chat(body)
        return await _explained(request, body, params, ids)
    assert isinstance(body, CompletionRequest)
    params = await asked_params(body, state.engine.default_sampling_params)
    prompts = await completion_ids(state.tokenising, body)
    if len(prompts) != 1:
        message = f"prompt holds {len(prompts)} prompts; one at a time is explained"
        raise RequestError(message, param="prompt")
    return await _explained(request, body, params, prompts[0])


@router.post("/v1/messages/explain", **described("PrefixExplanation", MessagesRequest))
async def explain_message(request: Request) -> Response:
    """Tells the same of a message's prompt, in the form of Anthropic's API."""
    body = (await read_body(request, MessagesRequest)).chat()
    state = server_state(request)
    params = await asked_params(body, state.engine.default_sampling_params)
    ids = await state.tokenising.encode_chat(body)
    return await _explained(request, body, params, ids)


async def _explained(
    request: Request, body: SamplingFields, params: SamplingParams, ids: Sequence[int]
) -> Response:
    state, tenant = server_state(request), caller_of(request).tenant
    state.check_model(body.model)
    check_params(request, body, params)
    asked = SamplingParams(
        max_tokens=1,
        prefix_caching=params.prefix_caching,
        prompt_logprobs=params.prompt_logprobs,
    )
    prepared = state.engine.prepare(
        ids, asked, cache_salt=tenant.salt(body.cache_salt), share=tenant.share
    )
    found = await state.engine.explain_prefix(prepared)
    return json_response(await explanation_body(found, ids, state.tokenising))
