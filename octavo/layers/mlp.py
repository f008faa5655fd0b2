"""The dense gated MLP.

Held by the decoder and by the MoE layer (its shared expert).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.ops import Activation, Ops, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """(act(x @ gate.T) * (x @ up.T)) @ down.T."""

    gate: Weight
    up: Weight
    down: Weight
    activation: Activation

    def run(self, x_TM: Tensor, ops: Ops) -> Tensor:
        """Returns [T, M]."""
        return ops.gated_mlp(x_TM, self.gate, self.up, self.down, self.activation)
