"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. What leads to the routes is one op, and dispatch, experts and combine another,
so that a back end can fuse them; the layer never sees which tokens went where.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import NormInput
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert
from octavo.layers.forward import Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Sum of the best experts of each token, weighted by the router, and of the shared expert."""

    counts_row: int
    """Which row of the step's expert counts is this layer's."""
    router: Router
    experts: ExpertWeights
    shared: SharedExpert | None
    activation: Activation

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor, Tensor]:
        """Returns [T, M], or parts of it where the step allows them, and the residual."""
        counts_E = forward.expert_counts_LE[self.counts_row]
        routed = forward.ops.norm_route(rows, self.router, counts_E, forward.num_live)
        out_TM = forward.ops.moe(
            routed.x_TM,
            routed.topk_weights,
            routed.topk_ids,
            self.experts,
            self.activation,
            self.shared,
            routed.gate_T1,
            in_parts=forward.in_parts,
        )
        return out_TM, routed.residual_TM
