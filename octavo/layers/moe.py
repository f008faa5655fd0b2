"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. What leads to the routes is one op, and dispatch, experts and combine another,
so that a back end can fuse them; the layer never sees which tokens went where.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import NormInput
from octavo.kernels.ops import Ops
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Sum of the best experts of each token, weighted by the router, and of the shared expert."""

    router: Router
    experts: ExpertWeights
    shared: SharedExpert | None
    activation: Activation

    def run(
        self,
        rows: NormInput,
        ops: Ops,
        counts_E: Tensor,
        num_live: Tensor | None = None,
        *,
        in_parts: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns [T, M], or parts (see `Ops.moe`), and the residual; adds the number of tokens
        sent to each expert to counts_E. Tokens from num_live on are padding (see `Ops.route`)."""
        routed = ops.norm_route(rows, self.router, counts_E, num_live)
        out_TM = ops.moe(
            routed.x_TM,
            routed.topk_weights,
            routed.topk_ids,
            self.experts,
            self.activation,
            self.shared,
            routed.gate_T1,
            in_parts=in_parts,
        )
        return out_TM, routed.residual_TM
