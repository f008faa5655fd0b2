"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. What leads to the routes is one op, and dispatch, experts and combine another,
so that a back end can fuse them; the layer never sees which tokens went where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import NormInput, Routed
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
    held: range | None
    """Which of the router's experts `experts` are, where ranks share whole ones; None: all. Every
    rank has all tokens, so that nothing is exchanged: what the ranks add is summed as ever."""
    shared: SharedExpert | None
    activation: Activation

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor, Tensor]:
        """Returns [T, M], or parts of it where the step allows them, and the residual."""
        counts_E = forward.expert_counts_LE[self.counts_row]
        routed = forward.ops.norm_route(rows, self.router, counts_E, forward.num_live)
        if self.held is not None:
            routed = replace(routed, topk_ids=_held_ids(routed.topk_ids, self.held))
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


def _held_ids(topk_ids: Tensor, held: range) -> Tensor:
    """Returns ids among the experts that are held, -1 for those of other ranks."""
    local = topk_ids - held.start
    return torch.where((local >= 0) & (local < len(held)), local, -1)
