"""From hidden states to what a model makes of a text: the head behind the decoder, on the host.

Made with the decoder's weights, called by the runner for each row that wants a vector. NumPy in
float64 and one row at a time: heads are small, and so neither neighbours nor devices change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.models.pooling_spec import PoolingSpec
from octavo.step import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooler:
    """One model's."""

    spec: PoolingSpec
    weight_LM: NDArray[np.float64] | None = None
    """[labels, hidden] the head; None: the hidden state is the vector."""
    soft_cap: float | None = None
    """Of the logits, where labels are tokens."""

    def vector(self, state_M: Float32) -> Float32:
        """Returns the embedding, [hidden], or the logits of the labels.

        `state_M` is the hidden state that `spec.reads`, normed as the decoder leaves it.
        """
        if self.weight_LM is None:
            return state_M.astype(np.float32)
        logits_L = np.einsum("lm,m->l", self.weight_LM, state_M.astype(np.float64))
        if self.soft_cap is not None:
            logits_L = self.soft_cap * np.tanh(logits_L / self.soft_cap)
        if len(self.spec.label_tokens) == 2:
            logits_L = logits_L[:1] - logits_L[1:]
        return logits_L.astype(np.float32)
