"""What a GPU's kernels write to the KV cache and make of it, in a model that is float32 else.

Used by the benchmarks of KV formats in place of float_model.py's attention: what is measured then
is what an engine stores and reads, but for its 16 bits elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from benchmarks.float_model import PlainOps
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.choose import SHORT_QUERIES, attention
from octavo.kernels.triton.attention.device_plan import DevicePlan
from octavo.kernels.triton.attention.write import rope_and_cache


class KernelOps(PlainOps):
    """The ops of the reference, and the Triton back end's attention, for one sequence."""

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        return rope_and_cache(qkv_TN.contiguous(), op, layer, batch)

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        if len(q_THD) > SHORT_QUERIES:  # as a planner says it of a lone prompt
            plan = DevicePlan(
                max_query_len=len(q_THD), num_short_tokens=0, num_few_tokens=0, max_partials=0
            )
            batch = replace(batch, plan=plan)
        return attention(q_THD, op, layer, batch)
