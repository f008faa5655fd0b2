"""RMSNorm, alone or fused with the residual addition before it.

Held by the decoder. It owns one vector of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.ops import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor
    eps: float

    def run(self, x_TM: Tensor, ops: Ops) -> Tensor:
        """Returns the normed x; x is kept."""
        return ops.rms_norm(x_TM, self.weight, self.eps)

    def add_and_run(self, x_TM: Tensor, residual_TM: Tensor, ops: Ops) -> Tensor:
        """Adds x to the residual in place and returns the normed residual."""
        return ops.add_rms_norm(x_TM, residual_TM, self.weight, self.eps)
