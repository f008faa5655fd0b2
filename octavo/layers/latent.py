"""Multi-head latent attention of one layer over paged latent vectors.

Held by the decoder; what a step brings comes in its Forward and is never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels.inputs import LatentOp, NormInput
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.layers.forward import Forward
from octavo.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Project, norm, rotate, write to the cache, attend, project back (DeepSeek-V2, 2.1)."""

    layer: int
    """Index of the decoder layer, whose KV it is."""
    op: LatentOp
    inputs: Sequence[Weight]
    """What makes queries, or their latent vectors, and what is kept of a token."""
    query_norm: RMSNorm | None
    query_up: Weight | None
    """Queries of their normed latent vectors, where there are such."""
    up: Weight
    """Keys and values of the heads."""
    output: Weight
    input_bias: Tensor | None = None
    output_bias: Tensor | None = None

    def prepared(self, ops: Ops) -> LatentAttention:
        """Returns the layer as `ops` want it, now that its numbers have arrived, with `op.weights`
        made of `up`."""
        weights = ops.prepare_latent(self.up, self.op.num_heads, self.op.nope_size)
        op = replace(self.op, weights=weights)
        (output,) = ops.prepare((self.output,))
        query_up = self.query_up and ops.prepare((self.query_up,))[0]
        inputs = ops.prepare(self.inputs)
        return replace(self, op=op, inputs=inputs, query_up=query_up, output=output)

    def run(self, rows: NormInput, forward: Forward) -> tuple[Tensor, Tensor]:
        """Returns [T, M] and the residual; writes what this step's tokens keep."""
        ops, columns = forward.ops, self.op.num_columns
        made_TN, residual_TM = ops.norm_linear(rows, self.inputs, self.input_bias)
        q_TN, latent_TC = made_TN.split([made_TN.shape[1] - columns, columns], dim=1)
        if self.query_up is not None:
            assert self.query_norm is not None
            norm = self.query_norm
            normed = ops.rms_norm(q_TN.contiguous(), norm.weight, norm.eps)
            q_TN = ops.linear(normed, (self.query_up,))
        kv, batch = forward.kv(self.layer)
        out_TN = ops.latent_attention(q_TN, latent_TC, self.op, kv, batch)
        return ops.linear(out_TN, (self.output,), self.output_bias), residual_TM
