"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. What leads to the routes is one op, and dispatch, experts and combine another,
so that a back end can fuse them; the layer never sees which tokens went where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import HeldParts, NormInput, Routed
from octavo.kernels.ops import Ops
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert
from octavo.layers.forward import Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Sum of the best experts of each token, weighted by the router, and of the shared expert."""

    counts_row: int
    """Which row of the step's expert counts is this layer's."""
    router: Router
    experts: ExpertWeights
    """Those of `Router.held`, where ranks share whole ones. Every rank has all tokens, so that
    nothing is exchanged: what the ranks add is summed as ever."""
    shared: SharedExpert | None
    activation: Activation

    def prepared(self, ops: Ops) -> MoE:
        """Returns the layer as `ops` want it, now that its numbers have arrived."""
        shared = self.shared
        if shared is not None:
            (down,) = ops.prepare((shared.down,))
            shared = SharedExpert(gate_up=ops.prepare(shared.gate_up), down=down)
        return replace(
            self,
            router=replace(self.router, weights=ops.prepare(self.router.weights)),
            experts=ops.prepare_experts(self.experts),
            shared=shared,
        )

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor | HeldParts, Tensor]:
        """Returns [T, M], or parts of it where the step allows them, and the residual."""
        counts_E = forward.expert_counts_LE[self.counts_row]
        routed = forward.ops.norm_route(rows, self.router, counts_E, forward.num_live)
        if self.router.rule.scales_input:
            return self._of_scaled_inputs(routed, forward.ops), routed.residual_TM
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
        if out_TM.ndim > 2 and self.router.held is not None:
            return HeldParts(rows_TSM=out_TM, ids_TK=routed.topk_ids), routed.residual_TM
        return out_TM, routed.residual_TM

    def _of_scaled_inputs(self, routed: Routed, ops: Ops) -> Tensor:
        """Each pair of token and expert is a row of its own, whose weight is in it already."""
        x_TM, (num_tokens, top_k) = routed.x_TM, routed.topk_ids.shape
        rows_PM = (
            (x_TM.unsqueeze(1) * routed.topk_weights.unsqueeze(2)).to(x_TM.dtype).flatten(0, 1)
        )
        ids_P1, ones_P1 = (
            routed.topk_ids.view(-1, 1),
            torch.ones_like(routed.topk_weights).view(-1, 1),
        )
        out_PM = ops.moe(rows_PM, ones_P1, ids_P1, self.experts, self.activation)
        out_TM = out_PM if top_k == 1 else out_PM.view(num_tokens, top_k, -1).sum(1)
        return ops.add_shared(out_TM, x_TM, self.shared, routed.gate_T1, self.activation)
