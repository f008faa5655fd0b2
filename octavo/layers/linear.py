"""A linear map: one or several weights side by side, and perhaps a bias.

Held by the other layers and the decoder. It never knows which kernel multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.ops import Ops, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x @ concat(weights).T + bias."""

    weights: tuple[Weight, ...]
    bias: Tensor | None = None

    def run(self, x_TM: Tensor, ops: Ops) -> Tensor:
        """Returns [T, sum of the weights' rows]."""
        return ops.linear(x_TM, self.weights, self.bias)
