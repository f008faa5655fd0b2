"""Ops made of other ops, for back ends that do not fuse them.

Inherited by the back ends, which override what they do in fewer launches. Holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, NormInput, Routed
from octavo.kernels.latent import ComposedLatent
from octavo.kernels.ops import Ops
from octavo.kernels.planning import AttentionPlanner, PlanLimits, PlannedGroup, Unplanned
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight


class Composed(ComposedLatent):
    """See `octavo.kernels.ops.Ops`."""

    def prepare(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        return weights

    def prepare_experts(self, experts: ExpertWeights) -> ExpertWeights:
        return experts

    def norm_linear(
        self: Ops, rows: NormInput, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.linear(rows.normed(self), weights, bias_N), rows.residual_TM

    def logits(self: Ops, x_SM: Tensor, weight: Weight) -> Tensor:
        return self.linear(x_SM, (weight,))

    def norm_route(
        self: Ops,
        rows: NormInput,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> Routed:
        x_TM = rows.normed(self)
        logits_TE, gate_T1 = router_logits(self, x_TM, router)
        weights, ids = self.route(logits_TE, router, counts_E, num_live)
        return Routed(
            x_TM=x_TM,
            residual_TM=rows.residual_TM,
            topk_weights=weights,
            topk_ids=ids,
            gate_T1=gate_T1,
        )

    def rope_attention(
        self: Ops, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        return self.attention(self.rope_and_cache(qkv_TN, op, layer, batch), op, layer, batch)

    def add_shared(
        self: Ops,
        out_TM: Tensor,
        x_TM: Tensor,
        shared: SharedExpert | None,
        gate_T1: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        if shared is not None:
            part_TM = self.gated_mlp(x_TM, shared.gate_up, shared.down, activation)
            self.add_gated(out_TM, part_TM, gate_T1)
        return out_TM

    def planner(
        self, groups: Sequence[PlannedGroup], limits: PlanLimits, device: torch.device
    ) -> AttentionPlanner:
        return Unplanned()

    def copy_blocks(self, arena: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            arena[target].copy_(arena[source])


def router_logits(ops: Ops, x_TM: Tensor, router: Router) -> tuple[Tensor, Tensor | None]:
    """Returns the logits of the experts [T, E], and of the shared expert's gate [T, 1] if any."""
    first, *others = router.weights
    if not router.rule.float32_logits and router.bias_E is None:
        logits_TN = ops.linear(x_TM, router.weights)
        return logits_TN[:, : first.rows], logits_TN[:, first.rows :] if others else None
    gate_T1 = ops.linear(x_TM, others) if others else None
    if not router.rule.float32_logits:
        return ops.linear(x_TM, (first,), router.bias_E), gate_T1
    logits_TE = ops.logits(x_TM, first)
    return logits_TE if router.bias_E is None else logits_TE.add_(router.bias_E), gate_T1
