"""Grouped-query attention of one layer over paged KV.

Held by the decoder; the step's AttentionBatch and the layer's KV are passed in, never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, KVLayer, NormInput, QKNorm, RopeTable
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.parallel import ALONE, Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Project, norm, rotate, write to the cache, attend, project back."""

    qkv: tuple[Weight, ...]
    output: Weight
    qk_norm: QKNorm | None
    rope: RopeTable
    num_heads: int
    num_kv_heads: int
    scale: float
    window: int | None
    clip_qkv: float | None
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    collectives: Collectives = ALONE

    def run(
        self, rows: NormInput, layer: KVLayer, batch: AttentionBatch, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """Returns [T, M] and the residual; writes this step's keys and values to `layer`."""
        qkv_TN, residual_TM = ops.norm_linear(rows, self.qkv, self.qkv_bias)
        qk_norm = self.qk_norm
        is_norm_shared = not (qk_norm is None or qk_norm.per_head or self.collectives.size == 1)
        if is_norm_shared or self.clip_qkv is not None:
            qkv_TN = self._norm_and_clip(qkv_TN, ops)
            qk_norm = None
        out_TN = ops.rope_attention(
            qkv_TN, self.num_heads, self.rope, qk_norm, layer, batch, self.scale, self.window
        )
        return ops.linear(out_TN, (self.output,), self.output_bias), residual_TM

    def _norm_and_clip(self, qkv_TN: Tensor, ops: Ops) -> Tensor:
        """The clamp, and the sum over ranks of a norm of whole projections, come where the fused op
        does not part; so rare that ops of their own would not pay."""
        head_size = qkv_TN.shape[1] // (self.num_heads + 2 * self.num_kv_heads)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv_TN.split([count * head_size for count in heads], dim=1)
        norm = self.qk_norm
        if norm is not None and (norm.per_head or self.collectives.size == 1):
            q, k = (
                ops.rms_norm(part.reshape(-1, len(weight)), weight, norm.eps).view(part.shape)
                for part, weight in ((q, norm.query), (k, norm.key))
            )
        elif norm is not None:
            q, k = self._norm_over_ranks(q, k, norm)
        qkv_TN = torch.cat((q, k, v), dim=1)
        return qkv_TN if self.clip_qkv is None else qkv_TN.clamp_(-self.clip_qkv, self.clip_qkv)

    def _norm_over_ranks(self, q_TN: Tensor, k_TN: Tensor, norm: QKNorm) -> tuple[Tensor, ...]:
        """Every head is on equally many ranks, so the mean of the ranks' means is that of all."""
        means = [part.float().square().mean(dim=1) for part in (q_TN, k_TN)]
        means = self.collectives.all_reduce(torch.stack(means)) / self.collectives.size
        return tuple(
            (part * torch.rsqrt(mean + norm.eps)[:, None] * weight).to(part.dtype)
            for part, mean, weight in ((q_TN, means[0], norm.query), (k_TN, means[1], norm.key))
        )
