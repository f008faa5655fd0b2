"""From what the engine tells of a text to what is told to users: lengths, activations, similarity.

Used by the faces and the server, which keep vectors packed until they write them. NumPy, one vector
at a time; never imports torch.
"""

from __future__ import annotations

import numpy as np

from octavo.errors import RequestError
from octavo.models.pooling_spec import PoolingSpec
from octavo.pooling import PoolingParams
from octavo.step import Float32

WRONG_KIND = "unsupported_by_model"
"""The code of errors that say what a model is."""


class VectorReader:
    """Reads the vectors of one model. Keeps no state."""

    def __init__(self, spec: PoolingSpec, hidden_size: int) -> None:
        self.spec = spec
        self.dimension = hidden_size
        """Numbers of an embedding."""

    def check(self, params: PoolingParams) -> None:
        """Raises RequestError if the model has no such vectors."""
        wanted, spec = params.dimensions, self.spec
        if wanted is None or (spec.kind == "embed" and wanted == self.dimension):
            return
        if spec.kind != "embed":
            message = f"dimensions is {wanted}, but this is {spec.described}: leave it out"
            raise RequestError(message, param="dimensions")
        if spec.matryoshka is False:
            raise RequestError(
                f"dimensions is {wanted}, but nothing says that this model was trained for "
                f"embeddings of fewer than {self.dimension} numbers; leave it out, or have the "
                'operator put "is_matryoshka": true into its config.json',
                param="dimensions",
            )
        if isinstance(spec.matryoshka, tuple) and wanted not in spec.matryoshka:
            known = ", ".join(map(str, spec.matryoshka))
            message = f"dimensions is {wanted}; this model has embeddings of {known} numbers"
            raise RequestError(message, param="dimensions")
        if wanted > self.dimension:
            message = f"dimensions is {wanted}; this model has at most {self.dimension}"
            raise RequestError(message, param="dimensions")

    def require(self, *kinds: str, what: str) -> None:
        """Raises RequestError unless the model is of one of `kinds`."""
        if self.spec.kind not in kinds:
            message = f"the model is {self.spec.described}: {what} need another one"
            raise RequestError(message, param="model", code=WRONG_KIND)

    def read(self, packed: bytes, params: PoolingParams) -> Float32:
        """Returns the embedding, or what is told of each label, of a vector in bytes."""
        found = np.frombuffer(packed, np.float32)
        is_active = params.use_activation is not False
        if self.spec.kind == "embed":
            found = found[: params.dimensions]
            wants_norm = params.use_activation or self.spec.normalize
            return normalised(found) if is_active and wants_norm else found
        return self._activated(found) if is_active else found

    def _activated(self, logits: Float32) -> Float32:
        wide = logits.astype(np.float64)
        if self.spec.activation == "sigmoid":
            # Of the negative size, which no exponential overflows.
            small = np.exp(-np.abs(wide))
            wide = np.where(wide < 0, small, 1.0) / (1.0 + small)
        elif self.spec.activation == "softmax":
            wide = np.exp(wide - wide.max())
            wide = wide / wide.sum()
        return wide.astype(np.float32)


def normalised(vector: Float32) -> Float32:
    """Returns the vector of length 1 in its direction; zeros stay zeros."""
    wide = vector.astype(np.float64)
    return (wide / max(float(np.sqrt(wide @ wide)), 1e-12)).astype(np.float32)


def similarity(first: bytes, second: bytes) -> float:
    """Returns the cosine between two packed embeddings."""
    one, other = (normalised(np.frombuffer(each, np.float32)) for each in (first, second))
    cosine = float(one.astype(np.float64) @ other.astype(np.float64))
    return min(1.0, max(-1.0, cosine))  # the parts of a unit vector are rounded
