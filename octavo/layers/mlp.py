"""The dense gated MLP.

Held by the decoder, for layers without experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import NormInput
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.layers.forward import Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """(act(x @ gate.T) * (x @ up.T)) @ down.T."""

    gate_up: Sequence[Weight]
    """Gate and up."""
    down: Weight
    activation: Activation

    def prepared(self, ops: Ops) -> GatedMLP:
        """Returns the layer as `ops` want it, now that its numbers have arrived."""
        (down,) = ops.prepare((self.down,))
        return replace(self, gate_up=ops.prepare(self.gate_up), down=down)

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor, Tensor]:
        """Returns [T, M] and the residual."""
        ops = forward.ops
        x_TM = rows.normed(ops)
        out_TM = ops.gated_mlp(x_TM, self.gate_up, self.down, self.activation)
        return out_TM, rows.residual_TM
