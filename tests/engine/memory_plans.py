"""A memory plan of no model, for fleets whose engines are played."""

from __future__ import annotations

from octavo.formats import kv_format
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.spec import attention_kv, group_layers

PLAN = MemoryPlan(
    available_bytes=1,
    usable_bytes=1,
    weights_bytes=1,
    activation_bytes=1,
    groups=group_layers((attention_kv(1, 1, kv_format("float32")),)),
    block_size=16,
    num_chunks=100,
    max_model_len=100,
    max_num_batched_tokens=10,
    max_position_embeddings=100,
    max_num_seqs=10,
)
