"""What users ask of models that make vectors or scores of texts, and what they get.

Taken and returned by LLM and AsyncLLM. Names are vLLM's. No torch, and no text processing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo.errors import RequestError, shown
from octavo.request import PackedPrompt
from octavo.request_limits import MAX_INT

Output = TypeVar("Output")


@dataclass(slots=True, kw_only=True)
class PoolingParams:
    """How a vector or a score is told. Raises RequestError on values that make no sense."""

    dimensions: int | None = None
    """Numbers of an embedding, of a model that was trained for shorter ones, too."""
    use_activation: bool | None = None
    """False: embeddings are not normalised, and scores are logits. None: as the model says."""

    def __post_init__(self) -> None:
        wanted = self.dimensions
        is_valid = wanted is None or (type(wanted) is int and 1 <= wanted <= MAX_INT)
        if not is_valid:
            message = f"dimensions must be an integer in 1..{MAX_INT}, got {shown(wanted)}"
            raise RequestError(message, param="dimensions")
        if self.use_activation not in (None, True, False):
            message = f"use_activation must be true or false, got {shown(self.use_activation)}"
            raise RequestError(message, param="use_activation")


@dataclass(slots=True, kw_only=True)
class PoolingRequestOutput(PackedPrompt, Generic[Output]):
    """What one prompt has come to."""

    request_id: str
    outputs: Output
    packed_prompt: bytes = field(repr=False)
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolingOutput:
    """Whatever the model makes of a text: an embedding, or what it says of its labels."""

    data: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """The vector of a text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationOutput:
    """A probability for each label."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOutput:
    """How well two texts belong together."""

    score: float


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]
