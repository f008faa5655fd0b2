"""POST /v1/score and POST /v1/rerank, and the other names of both.

Parses, asks the engine through `vector_calls`, formats. Rerankers read a query and a document as
one prompt; of an embedding model the score is the cosine of their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.engine.pooled_texts import text_pairs
from octavo.engine.vectors import VectorReader, similarity
from octavo.errors import RequestError
from octavo.server.body import read_body
from octavo.server.openapi import described
from octavo.server.pieces import Lazy
from octavo.server.protocol.pooling import MAX_TEXTS, PoolingFields, RerankRequest, ScoreRequest
from octavo.server.state import server_state
from octavo.server.streaming import long_response
from octavo.server.vector_calls import Vectors, begin, compute, in_turns

router = APIRouter(tags=["Scores"])

Pairs = Sequence[tuple[str, str]]


@router.post("/score", **described("Scores", ScoreRequest))
@router.post("/v1/score", **described("Scores", ScoreRequest))
async def score(request: Request) -> Response:
    """Returns how well the texts of each pair belong together."""
    body = await read_body(request, ScoreRequest)
    reader = _begin(request, body)
    pairs = text_pairs(body.text_1, body.text_2, ("text_1", "text_2"))
    if len(pairs) > MAX_TEXTS:
        message = f"text_2 makes {len(pairs)} pairs; at most {MAX_TEXTS} fit in one call"
        raise RequestError(message, param="text_2")
    found, scores = await _scores(request, body, reader, pairs, body.instruction)
    data = ({"index": i, "object": "score", "score": one} for i, one in enumerate(scores))
    state = server_state(request)
    answer = {
        **found.head(state.model_name),
        "data": Lazy(data, batch=256),
        "usage": found.usage(),
    }
    return await long_response(answer, state.drain)


@router.post("/rerank", **described("Reranked", RerankRequest))
@router.post("/v1/rerank", **described("Reranked", RerankRequest))
@router.post("/v2/rerank", **described("Reranked", RerankRequest))
async def rerank(request: Request) -> Response:
    """Returns the documents in order of their relevance for a query."""
    body = await read_body(request, RerankRequest)
    reader, most = _begin(request, body), body.most
    pairs = [(body.query, document) for document in body.documents]
    found, scores = await _scores(request, body, reader, pairs, body.instruction)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = (_result(body, index, scores[index]) for index in order[:most])
    state = server_state(request)
    answer = {
        "id": found.call.id,
        "model": state.model_name,
        "usage": found.usage(),
        "results": Lazy(results),
    }
    return await long_response(answer, state.drain)


def _begin(request: Request, body: PoolingFields) -> VectorReader:
    reader = begin(request, body)
    reader.require("score", "embed", what="scores of pairs")
    return reader


def _result(body: RerankRequest, index: int, score: float) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": score}
    if body.return_documents:
        result["document"] = {"text": body.documents[index]}
    return result


async def _scores(
    request: Request,
    body: PoolingFields,
    reader: VectorReader,
    pairs: Pairs,
    instruction: str | None,
) -> tuple[Vectors, list[float]]:
    """Returns what the engine computed, and the score of each pair."""
    state, params = server_state(request), body.params()
    limit = body.limit(state.engine.max_model_len)
    if reader.spec.kind == "embed":
        if instruction is not None:
            message = "instruction has no place beside an embedding; put it into the query"
            raise RequestError(message, param="instruction")
        return await _cosines(request, body, pairs, limit)
    prompts = await state.tokenising.encode_pairs(pairs, instruction)
    if limit is not None and any(len(ids) > limit for ids in prompts):
        message = "truncate_prompt_tokens cannot cut a pair: its end is the question; cut the texts"
        raise RequestError(message, param="truncate_prompt_tokens")
    found = await compute(request, body, "score", prompts)
    return found, await in_turns(float(reader.read(one, params)[0]) for one in found.packed)


async def _cosines(
    request: Request, body: PoolingFields, pairs: Pairs, limit: int | None
) -> tuple[Vectors, list[float]]:
    """Embeds each text once."""
    place_of = {
        text: place for place, text in enumerate(dict.fromkeys(t for pair in pairs for t in pair))
    }
    tokenising = server_state(request).tokenising
    if limit is None:
        prompts = await tokenising.encode(list(place_of))
    else:
        prompts = await tokenising.encode_cut(list(place_of), True, limit)
    found = await compute(request, body, "score", prompts)
    packed = found.packed
    each = (similarity(packed[place_of[a]], packed[place_of[b]]) for a, b in pairs)
    return found, await in_turns(each)
