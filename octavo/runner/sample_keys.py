"""The pass over a sample from which compressed keys learn, before the first request.

Made by the builder. Its keys and values lie in pages that nobody has yet, and nobody reads them
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import AttentionPlanner, StepRows
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.storage import KVStorage
from octavo.layers.attention import Attention
from octavo.models.decoder import Decoder
from octavo.models.sampled_keys import LEAST_TOKENS, learn
from octavo.step import Int32


def learn_keys(
    decoder: Decoder,
    storage: KVStorage,
    planner: AttentionPlanner,
    plan: MemoryPlan,
    token_ids: Sequence[int],
) -> int:
    """Runs as many of `token_ids` as a step and the pages take and has the decoder's layers learn
    from them; returns how many, 0 if they are too few to say anything."""
    if not any(isinstance(layer.mixer, Attention) for layer in decoder.layers):
        return 0
    most = min(len(token_ids), plan.max_num_batched_tokens, plan.max_model_len)
    tables = _tables(plan, most)
    while most >= LEAST_TOKENS and not tables:
        most //= 2
        tables = _tables(plan, most)
    if most < LEAST_TOKENS or any(group.is_state for group in plan.groups):
        return 0
    device = storage.arena.device
    batches = [_batch(table, most, plan.block_size, device) for table in tables]
    rows = StepRows(
        rows=np.zeros(1, np.int32),
        query_lens=np.full(1, most, np.int32),
        query_starts=np.array([0, most], np.int32),
        seq_lens=np.full(1, most, np.int32),
        tables=tables,
        num_started=1,
    )
    step = planner.plan(rows)
    arrays = [torch.from_numpy(one).to(device) for one in step.arrays]
    num_moe, num_experts = len(decoder.spec.moe_layers), max(decoder.spec.max_experts, 1)
    with torch.inference_mode():
        hidden_TM = decoder.forward(
            torch.tensor(token_ids[:most], dtype=torch.int32, device=device),
            step.on_device(batches, arrays),
            storage,
            torch.zeros(num_moe, num_experts, dtype=torch.int64, device=device),
            look=learn,
        )
        hidden_TM[:1].cpu()  # sync: steps run on a stream of their own
    return most


def _tables(plan: MemoryPlan, num_tokens: int) -> list[Int32]:
    """Returns a block table [1, pages] for each group, in chunks that follow that of the null page;
    none if there are too few chunks."""
    layout, num_pages = plan.layout, -(-num_tokens // plan.block_size)
    tables: list[Int32] = []
    chunk = 1
    for page_class in layout.class_of:
        per_chunk = layout.classes[page_class].pages_per_chunk
        tables.append(np.arange(num_pages, dtype=np.int32)[None] + np.int32(chunk * per_chunk))
        chunk += -(-num_pages // per_chunk)
    return tables if chunk <= plan.num_chunks else []


def _batch(table: Int32, num_tokens: int, block_size: int, device: torch.device) -> AttentionBatch:
    positions = np.arange(num_tokens, dtype=np.int32)
    slots = table[0, positions // block_size].astype(np.int64) * block_size
    arrays = (positions, slots + positions % block_size, np.array([0, num_tokens], np.int32))
    positions_T, slots_T, starts = (torch.from_numpy(one).to(device) for one in arrays)
    return AttentionBatch(
        positions_T=positions_T,
        slot_mapping_T=slots_T,
        query_starts=starts,
        seq_lens_S=starts[1:],
        block_table=torch.from_numpy(table).to(device),
    )
