"""Latent attention made of other ops: absorbed, as attention of one kv head.

Inherited by the back ends through `Composed`. The query of a head, multiplied by the key's
up-projection, meets latent vectors as if they were keys, and their weighted sum, multiplied by the
value's, is the head's output (DeepSeek-V2, arXiv 2405.04434, 2.1). Holds no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, LatentOp
from octavo.kernels.kv_pages import mixed_as, write_vectors
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.visibility import Full


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentWeights:
    """Up-projections of the heads, float32."""

    keys: tuple[Weight, ...]
    """Of each head [rank, nope]."""
    values: tuple[Weight, ...]
    """Of each head [value, rank]."""


class ComposedLatent:
    """See `octavo.kernels.ops.Ops`."""

    def prepare_latent(self: Ops, kv_b: Weight, num_heads: int, nope_size: int) -> object:
        unit = torch.eye(kv_b.cols, device=kv_b.data.device)  # exact, whatever the weight's format
        heads_HNR = self.linear(unit, (kv_b,)).float().T.reshape(num_heads, -1, kv_b.cols)
        keys, values = heads_HNR[:, :nope_size], heads_HNR[:, nope_size:]
        return LatentWeights(
            keys=tuple(_weight(one.T) for one in keys), values=tuple(map(_weight, values))
        )

    def latent_attention(
        self: Ops,
        q_TN: Tensor,
        latent_TC: Tensor,
        op: LatentOp,
        layer: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        assert isinstance(op.weights, LatentWeights)
        positions = batch.positions_T.long()
        cos, sin = op.rope.cos[positions], op.rope.sin[positions]
        c_TR = self.rms_norm(latent_TC[:, : op.rank].contiguous(), op.norm_R, op.norm_eps)
        key_TC = torch.cat((c_TR, _rotated(latent_TC[:, op.rank :], cos, sin)), dim=1)
        vectors = KVLayer((op.rank, op.rope_size), **layer.planes)
        write_vectors(vectors, "latent", batch.slot_mapping_T, key_TC)
        q_THD = q_TN.view(len(q_TN), op.num_heads, -1)
        rotated = _rotated(q_THD[..., op.nope_size :], cos.unsqueeze(1), sin.unsqueeze(1))
        absorbed = [
            self.linear(q_THD[:, head, : op.nope_size].contiguous(), (weight,))
            for head, weight in enumerate(op.weights.keys)
        ]
        q_THC = torch.cat((torch.stack(absorbed, dim=1), rotated), dim=2)
        q_THC = mixed_as(vectors, "latent", q_THC)
        sums = self.attention(q_THC, _absorbed_op(op), _one_head(vectors), batch)
        sums_THC = sums.view(q_THC.shape)
        parts = [
            self.linear(sums_THC[:, head, : op.rank].contiguous(), (weight,))
            for head, weight in enumerate(op.weights.values)
        ]
        return torch.cat(parts, dim=1)


def _weight(matrix: Tensor) -> Weight:
    data = matrix.contiguous()
    return Weight(data=data, format=WEIGHT_FORMATS["f32"], rows=data.shape[0], cols=data.shape[1])


def _one_head(vectors: KVLayer) -> KVLayer:
    """Returns latent vectors as keys and values of one head."""
    planes = {
        name.replace("latent", role): plane.unsqueeze(2)
        for name, plane in vectors.planes.items()
        for role in ("key", "value")
    }
    return KVLayer(vectors.parts, **planes)


def _absorbed_op(op: LatentOp) -> AttentionOp:
    return AttentionOp(
        num_heads=op.num_heads,
        num_kv_heads=1,
        head_size=op.num_columns,
        scale=op.scale,
        visibility=Full(),
        rope=None,
        qk_norm=None,
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
