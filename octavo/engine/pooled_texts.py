"""Prompts to requests for vectors, and what these come to as Python users get it.

Used by LLM and AsyncLLM. Runs nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from octavo.engine.vectors import VectorReader, similarity
from octavo.errors import OctavoError, RequestError, shown
from octavo.models.pooling_spec import Kind
from octavo.outputs import OutputDelta
from octavo.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringOutput,
)
from octavo.request import FinishReason, Request

Wanted = Literal["embed", "classify", "score", "encode"]
KINDS: Mapping[Wanted, tuple[Kind, ...]] = {
    "embed": ("embed",),
    "classify": ("classify", "score"),
    "score": ("score",),
    "encode": ("embed", "classify", "score"),
}
"""Of the models that give what is wanted."""


def checked_params(
    given: PoolingParams | None, wanted: Wanted, reader: VectorReader
) -> PoolingParams:
    """Returns a user's parameters, or those that ask for nothing. Raises RequestError."""
    if given is not None and not isinstance(given, PoolingParams):
        message = f"pooling_params must be PoolingParams, got {type(given).__name__}"
        raise RequestError(message, param="pooling_params")
    params = PoolingParams() if given is None else given
    params = PoolingParams(dimensions=params.dimensions, use_activation=params.use_activation)
    reader.require(*KINDS[wanted], what=f"calls of {wanted}")
    reader.check(params)
    return params


def pooled_output(
    request: Request,
    delta: OutputDelta,
    reader: VectorReader,
    params: PoolingParams,
    wanted: Wanted,
    request_id: str | None = None,
) -> PoolingRequestOutput[Any]:
    """Returns what a finished request has come to. Raises OctavoError if that is nothing."""
    data = reader.read(vector_of(delta), params)
    outputs: object = PoolingOutput(data=data)
    if wanted == "embed":
        outputs = EmbeddingOutput(embedding=data.tolist())
    elif wanted == "classify":
        outputs = ClassificationOutput(probs=data.tolist())
    elif wanted == "score":
        outputs = ScoringOutput(score=float(data[0]))
    return PoolingRequestOutput(
        request_id=request_id or request.request_id,
        outputs=outputs,
        packed_prompt=request.packed_prompt,
        num_cached_tokens=delta.num_cached_tokens,
    )


def cosine_output(
    first: tuple[Request, OutputDelta], second: tuple[Request, OutputDelta]
) -> PoolingRequestOutput[ScoringOutput]:
    """Returns the score of two texts that were embedded apart; its prompt is both."""
    (one, one_delta), (other, other_delta) = first, second
    return PoolingRequestOutput(
        request_id=one.request_id,
        outputs=ScoringOutput(score=similarity(vector_of(one_delta), vector_of(other_delta))),
        packed_prompt=one.packed_prompt + other.packed_prompt,
        num_cached_tokens=one_delta.num_cached_tokens + other_delta.num_cached_tokens,
    )


def vector_of(delta: OutputDelta) -> bytes:
    """Returns the vector that a request has ended with. Raises OctavoError if it has none."""
    if delta.vector is None:
        reason = (
            "it was aborted" if delta.finish_reason == FinishReason.ABORT else delta.stop_reason
        )
        raise OctavoError(f"the engine could not finish this request: {reason}")
    return delta.vector


def text_pairs(first: object, second: object, names: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns the pairs of one text with each of several, or of two lists of the same length.
    Raises RequestError."""
    firsts, seconds = (_texts(one, name) for one, name in zip((first, second), names, strict=True))
    if isinstance(first, str) or len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise RequestError(
            f"{names[0]} has {len(firsts)} texts and {names[1]} {len(seconds)}; give one, or as "
            "many as there are in the other",
            param=names[0],
        )
    return list(zip(firsts, seconds, strict=True))


def _texts(given: object, name: str) -> list[str]:
    if isinstance(given, str):
        return [given]
    is_right = isinstance(given, Sequence) and all(isinstance(one, str) for one in given)
    if not is_right or not given:
        message = f"{name} must be a text or a list of texts, got {shown(given)}"
        raise RequestError(message, param=name)
    assert isinstance(given, Sequence)
    return list(given)
