"""Grouped-query attention of one layer over paged KV.

Held by the decoder; what a step brings comes in its Forward and is never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionOp, NormInput, QKNorm
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.layers.forward import Forward
from octavo.parallel import Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Project, norm, rotate, write to the cache, attend, project back."""

    layer: int
    """Index of the decoder layer, whose KV it is."""
    op: AttentionOp
    qkv: Sequence[Weight]
    output: Weight
    early_norm: QKNorm | None = None
    """A norm that cannot wait for `op`, where the clamp or other ranks come in between."""
    clip_qkv: float | None = None
    temperatures: Tensor | None = None
    """float32 [positions]: what queries are multiplied by."""
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None

    def prepared(self, ops: Ops) -> Attention:
        """Returns the layer as `ops` want it, now that its numbers have arrived."""
        (output,) = ops.prepare((self.output,))
        return replace(self, qkv=ops.prepare(self.qkv), output=output)

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor, Tensor]:
        """Returns [T, M] and the residual; writes this step's keys and values."""
        ops = forward.ops
        qkv_TN, residual_TM = ops.norm_linear(rows, self.qkv, self.qkv_bias)
        if self.early_norm is not None:
            qkv_TN = self._normed(qkv_TN, self.early_norm, ops, forward.collectives)
        if self.clip_qkv is not None:
            qkv_TN = qkv_TN.clamp_(-self.clip_qkv, self.clip_qkv)
        kv, batch = forward.kv(self.layer)
        if self.temperatures is not None:
            q_TN = qkv_TN[:, : self.op.num_heads * self.op.head_size]
            q_TN *= self.temperatures[batch.positions_T.long()].unsqueeze(1)
        if forward.look is not None:
            forward.look(self.op, qkv_TN)
        out_TN = ops.rope_attention(qkv_TN, self.op, kv, batch)
        return ops.linear(out_TN, (self.output,), self.output_bias), residual_TM

    def _normed(self, qkv_TN: Tensor, norm: QKNorm, ops: Ops, collectives: Collectives) -> Tensor:
        op = self.op
        heads = [op.num_heads, op.num_kv_heads, op.num_kv_heads]
        q, k, v = qkv_TN.split([count * op.head_size for count in heads], dim=1)
        if norm.per_head or collectives.size == 1:
            q, k = (
                ops.rms_norm(part.reshape(-1, len(weight)), weight, norm.eps).view(part.shape)
                for part, weight in ((q, norm.query), (k, norm.key))
            )
        else:
            q, k = _norm_over_ranks(q, k, norm, collectives)
        return torch.cat((q, k, v), dim=1)


def norms_early(norm: QKNorm | None, clip_qkv: float | None, collectives: Collectives) -> bool:
    """Whether `norm` must be done before the fused op: what it leaves is clamped, or its mean is
    over heads of all ranks. So rare that fusing these too would not pay."""
    if norm is None:
        return False
    return clip_qkv is not None or not (norm.per_head or collectives.size == 1)


def _norm_over_ranks(
    q_TN: Tensor, k_TN: Tensor, norm: QKNorm, collectives: Collectives
) -> tuple[Tensor, ...]:
    """Every head is on equally many ranks, so the mean of the ranks' means is that of all."""
    means = [part.float().square().mean(dim=1) for part in (q_TN, k_TN)]
    means = collectives.all_reduce(torch.stack(means)) / collectives.size
    return tuple(
        (part * torch.rsqrt(mean + norm.eps)[:, None] * weight).to(part.dtype)
        for part, mean, weight in ((q_TN, means[0], norm.query), (k_TN, means[1], norm.key))
    )
