"""Ops made of other ops, for back ends that do not fuse them.

Inherited by the back ends, which override what they do in fewer launches. Holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, KVLayer, NormInput, QKNorm, RopeTable, Routed
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Activation, Router, SharedExpert, Weight


class Composed:
    """See `octavo.kernels.ops.Ops`."""

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
        logits_TN = self.linear(x_TM, router.weights)
        num_experts = router.weights[0].rows
        weights, ids = self.route(
            logits_TN[:, :num_experts],
            router.top_k,
            router.scoring,
            router.renormalize,
            counts_E,
            num_live,
        )
        return Routed(
            x_TM=x_TM,
            residual_TM=rows.residual_TM,
            topk_weights=weights,
            topk_ids=ids,
            gate_T1=logits_TN[:, num_experts:] if len(router.weights) > 1 else None,
        )

    def rope_attention(
        self: Ops,
        qkv_TN: Tensor,
        num_heads: int,
        rope: RopeTable,
        qk_norm: QKNorm | None,
        layer: KVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        q_THD = self.rope_and_cache(qkv_TN, num_heads, rope, qk_norm, layer, batch)
        return self.attention(q_THD, layer, batch, scale, window)

    def add_shared(
        self: Ops,
        out_TM: Tensor,
        x_TM: Tensor,
        shared: SharedExpert | None,
        gate_T1: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        """Returns out + sigmoid(gate) * shared(x), added in place."""
        if shared is not None:
            part_TM = self.gated_mlp(x_TM, shared.gate, shared.up, shared.down, activation)
            self.add_gated(out_TM, part_TM, gate_T1)
        return out_TM

    def copy_blocks(self, arena: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            arena[target].copy_(arena[source])
