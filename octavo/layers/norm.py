"""RMSNorm before a layer's products.

Held by the decoder. It owns one vector of weights; the products' ops decide when to norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.inputs import HeldParts, NormInput
from octavo.parallel import Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNorm:
    """y / sqrt(mean(y^2) + eps) * weight."""

    weight: Tensor
    eps: float

    def of(
        self,
        x_TM: Tensor | HeldParts | None,
        residual_TM: Tensor,
        ranks: Collectives | None = None,
    ) -> NormInput:
        """Returns y = residual + x, to be normed; the residual is given away. `ranks`: those over
        which x is still to be summed."""
        return NormInput(
            x_TM=x_TM, residual_TM=residual_TM, weight_M=self.weight, eps=self.eps, ranks=ranks
        )
