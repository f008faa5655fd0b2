"""POST /tokenize and POST /detokenize.

Asks the tokenizer alone; never reaches the engine.
"""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import ContextLengthError, RequestError
from octavo.server.body import read_body
from octavo.server.engine_client import Engine
from octavo.server.openapi import described
from octavo.server.pieces import Lazy
from octavo.server.protocol.strict import PackedIds
from octavo.server.protocol.tokens import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    TokenizeTextRequest,
)
from octavo.server.state import server_state
from octavo.server.streaming import json_response, long_response

router = APIRouter(tags=["Tokens"])


@router.post("/tokenize", **described("Tokens", TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Returns the token ids of `prompt`, or of `messages` in the chat template."""
    body = await read_body(request, TokenizeRequest)
    state = server_state(request)
    state.check_model(body.model)
    if isinstance(body, TokenizeChatRequest):
        ids = await state.tokenising.encode_chat(body)
    else:
        assert isinstance(body, TokenizeTextRequest)
        [ids] = await state.tokenising.encode([body.prompt], body.add_special_tokens)
    answer = {
        "count": len(ids),
        "max_model_len": state.engine.max_model_len,
        "tokens": Lazy(ids, batch=4096),
    }
    if body.return_token_strs:
        answer["token_strs"] = Lazy(await state.tokenising.tokens(ids), batch=1024)
    return await long_response(answer, state.drain)


@router.post("/detokenize", **described("Detokenized", DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Returns the text of token ids, special tokens included."""
    body = await read_body(request, DetokenizeRequest)
    state = server_state(request)
    state.check_model(body.model)
    _check_ids(body.tokens, state.engine)
    text = await state.tokenising.decode(body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})


def _check_ids(token_ids: PackedIds, engine: Engine) -> None:
    """Raises RequestError for more ids than the context holds, and for one that does not exist."""
    most, limit = engine.max_model_len, engine.vocab_size
    if len(token_ids) > most:
        message = f"tokens has {len(token_ids)} ids, but the context holds {most}; send fewer"
        raise ContextLengthError(message, param="tokens")
    ids = np.frombuffer(token_ids, np.uint32)
    if ids.size and ids.max() >= limit:
        index = int(np.argmax(ids >= limit))
        message = f"tokens[{index}] is {ids[index]}; the vocabulary ends at {limit - 1}"
        raise RequestError(message, param="tokens")
