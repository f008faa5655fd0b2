"""Grouped-query attention of one layer over paged KV.

Held by the decoder; the step's AttentionBatch and the layer's KV are passed in, never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.ops import AttentionBatch, KVLayer, Ops, QKNorm, RopeTable
from octavo.layers.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Project, norm, rotate, write to the cache, attend, project back."""

    qkv: Linear
    output: Linear
    qk_norm: QKNorm | None
    rope: RopeTable
    num_heads: int
    num_kv_heads: int
    scale: float
    window: int | None
    clip_qkv: float | None

    def run(self, x_TM: Tensor, layer: KVLayer, batch: AttentionBatch, ops: Ops) -> Tensor:
        """Returns [T, M] and writes this step's keys and values to `layer`."""
        qkv_TN = self.qkv.run(x_TM, ops)
        qk_norm = self.qk_norm
        if self.clip_qkv is not None:
            qkv_TN = self._norm_and_clip(qkv_TN, self.clip_qkv, ops)
            qk_norm = None
        q_THD = ops.rope_and_cache(qkv_TN, self.num_heads, self.rope, qk_norm, layer, batch)
        out_TN = ops.attention(q_THD, layer, batch, self.scale, self.window)
        return self.output.run(out_TN, ops)

    def _norm_and_clip(self, qkv_TN: Tensor, limit: float, ops: Ops) -> Tensor:
        """The clamp comes between norm and rotation, which the fused op does not part; so rare
        that an op of its own would not pay."""
        head_size = qkv_TN.shape[1] // (self.num_heads + 2 * self.num_kv_heads)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv_TN.split([count * head_size for count in heads], dim=1)
        norm = self.qk_norm
        if norm is not None:
            q, k = (
                ops.rms_norm(part.reshape(-1, len(weight)), weight, norm.eps).view(part.shape)
                for part, weight in ((q, norm.query), (k, norm.key))
            )
        return torch.cat((q, k, v), dim=1).clamp_(-limit, limit)
