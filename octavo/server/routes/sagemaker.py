"""POST /invocations: SageMaker's one route for all work. Its probe is GET /ping.

Parses, and goes the way of a chat or a completion.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.body import read_body
from octavo.server.openapi import described
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.invocations import InvocationRequest
from octavo.server.protocol.strict import StrictModel
from octavo.server.routes.chat import answer_chat
from octavo.server.routes.completions import answer_completion

router = APIRouter(tags=["Operation"])


@router.post("/invocations", **described("Invocation", InvocationRequest, streams=True))
async def invoke(request: Request) -> Response:
    """Answers a chat's body (with `messages`) or a completion's; for SageMaker."""
    body: StrictModel = await read_body(request, InvocationRequest)
    if isinstance(body, ChatRequest):
        return await answer_chat(request, body)
    assert isinstance(body, CompletionRequest)
    return await answer_completion(request, body)
