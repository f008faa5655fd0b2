"""POST /v1/embeddings and POST /pooling.

Parses, asks the engine through `vector_calls`, formats. Vectors stay packed until they are written.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.body import read_body
from octavo.server.openapi import described
from octavo.server.pieces import Lazy
from octavo.server.protocol.pooling import (
    EmbeddingRequest,
    Encoding,
    InputFields,
    PoolingRequest,
)
from octavo.server.state import server_state
from octavo.server.streaming import long_response
from octavo.server.vector_calls import begin, compute
from octavo.step import Float32

router = APIRouter(tags=["Embeddings"])


@router.post("/v1/embeddings", **described("Embeddings", EmbeddingRequest))
async def create_embeddings(request: Request) -> Response:
    """Returns the embedding of each text."""
    body = await read_body(request, EmbeddingRequest)
    begin(request, body).require("embed", what="embeddings")
    return await _answer(request, body, kind="embd", item="embedding", field="embedding")


@router.post("/pooling", **described("Pooled", PoolingRequest))
async def pool(request: Request) -> Response:
    """Returns what the model makes of each text: an embedding, or a number for each label."""
    body = await read_body(request, PoolingRequest)
    reader = begin(request, body)
    if body.task is not None:
        reader.require(body.task, what=f"calls of task {body.task}")
    return await _answer(request, body, kind="pool", item="pooling", field="data")


async def _answer(
    request: Request, body: InputFields, *, kind: str, item: str, field: str
) -> Response:
    state, reader, params = server_state(request), begin(request, body), body.params()
    found = await compute(request, body, kind, await _prompts(request, body))

    def data() -> Iterator[dict[str, Any]]:
        for index, packed in enumerate(found.packed):
            vector = written(reader.read(packed, params), body.encoding_format)
            yield {"object": item, "index": index, field: vector}

    answer = {
        **found.head(state.model_name),
        "data": Lazy(data()),
        "usage": found.usage(),
    }
    return await long_response(answer, state.drain)


async def _prompts(request: Request, body: InputFields) -> Sequence[Sequence[int]]:
    """Returns the ids of each input, cut where that is asked for. Raises RequestError."""
    state, given = server_state(request), body.inputs()
    limit = body.limit(state.engine.max_model_len)
    texts = [one for one in given if isinstance(one, str)]
    if not texts:
        return [one[:limit] for one in given if not isinstance(one, str)]
    # All are of one kind: texts, or ids already.
    if limit is None:
        return await state.tokenising.encode(texts, body.add_special_tokens)
    return await state.tokenising.encode_cut(texts, body.add_special_tokens, limit)


def written(vector: Float32, encoding: Encoding) -> list[float] | str:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
