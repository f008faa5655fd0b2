"""Paged batches on a GPU for the benchmarks of attention, and what is right for them.

Imported by attention.py, splits.py and hopper_checks.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.choose import SHORT_QUERIES
from octavo.kernels.triton.attention.splits import Tiling, tiling
from octavo.kernels.triton.launching.chip import num_processors
from octavo.visibility import Full, Window

BLOCK = 16


def make_batch(seq_lens: list[int], query_lens: list[int], num_blocks: int) -> AttentionBatch:
    counts = [-(-n // BLOCK) for n in seq_lens]
    order = torch.randperm(num_blocks)[: sum(counts)].to(torch.int32)
    table = torch.full((len(counts), max(counts) + 1), 2**30, dtype=torch.int32)
    for s, part in enumerate(order.split(counts)):
        table[s, : counts[s]] = part
    positions = [torch.arange(n - q, n) for n, q in zip(seq_lens, query_lens, strict=True)]
    slots = [table[s, p // BLOCK].long() * BLOCK + p % BLOCK for s, p in enumerate(positions)]
    return AttentionBatch(
        positions_T=torch.cat(positions).to(torch.int32).cuda(),
        slot_mapping_T=torch.cat(slots).cuda(),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).cuda(),
        seq_lens_S=torch.tensor(seq_lens, dtype=torch.int32).cuda(),
        block_table=table.cuda(),
    )


def make_layers(
    num_blocks: int, num_layers: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> list[KVLayer]:
    shape = (num_blocks, num_layers, 2, BLOCK, kv_heads, head_size)
    arena = torch.empty(shape, dtype=dtype, device="cuda")
    for part in arena.split(max(1, (1 << 28) // arena[0].numel())):
        part.copy_(torch.randn(part.shape, device="cuda"))
    return [KVLayer(key=arena[:, i, 0], value=arena[:, i, 1]) for i in range(num_layers)]


def op_of(q: torch.Tensor, layer: KVLayer, window: int | None = None) -> AttentionOp:
    """Attention of scale 1 / sqrt(D)."""
    return AttentionOp(
        num_heads=q.shape[1],
        num_kv_heads=layer.key.shape[2],
        head_size=q.shape[2],
        scale=q.shape[2] ** -0.5,
        visibility=Full() if window is None else Window(window),
        rope=None,
        qk_norm=None,
    )


def exact(q: torch.Tensor, layer: KVLayer, batch: AttentionBatch, window: int | None):
    """float64 attention, scale 1 / sqrt(D)."""
    parts, (_, H, D) = [], q.shape
    for s in range(len(batch.seq_lens_S)):
        a, b = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        n = int(batch.seq_lens_S[s])
        blocks = batch.block_table[s, : -(-n // BLOCK)].long()
        k, v = (x[blocks].flatten(0, 1)[:n].double() for x in (layer.key, layer.value))
        group = H // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), k) / math.sqrt(D)
        at, pos = torch.arange(n, device="cuda"), batch.positions_T[a:b].unsqueeze(1)
        hidden = at > pos
        if window is not None:
            hidden |= at <= pos - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(parts)


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN counts as infinite."""
    error = ((found.double() - expected).norm() / expected.norm()).item()
    return error if error == error else math.inf


def same_bits(one: torch.Tensor, other: torch.Tensor, queries: int) -> bool:
    """Whether rows are the same in another batch; in short chunks, split otherwise, nearly so."""
    if 2 <= queries <= SHORT_QUERIES:
        return norm_error(one, other.double()) < 1e-2
    return torch.equal(one, other)


def tiles_of(H: int, K: int) -> Tiling:
    return tiling(H, K, num_processors(torch.device("cuda", 0)))


def share_blocks(batch: AttentionBatch, blocks: int) -> np.ndarray:
    """Gives all sequences the first one's leading blocks; returns the table on the host."""
    batch.block_table[:, :blocks] = batch.block_table[0, :blocks]
    return batch.block_table.cpu().numpy()


def poison(layer: KVLayer, batch: AttentionBatch) -> None:
    """Writes NaN to every slot that no sequence owns."""
    seen = torch.zeros(layer.key.shape[:2], dtype=torch.bool, device="cuda")
    for s, n in enumerate(batch.seq_lens_S.tolist()):
        at = torch.arange(n, device="cuda")
        seen[batch.block_table[s, at // BLOCK].long(), at % BLOCK] = True
    for pages in (layer.key, layer.value):
        pages[~seen] = math.nan


def alone(batch: AttentionBatch, s: int, rows: slice) -> AttentionBatch:
    return AttentionBatch(
        positions_T=batch.positions_T[rows],
        slot_mapping_T=batch.slot_mapping_T[rows],
        query_starts=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device="cuda"),
        seq_lens_S=batch.seq_lens_S[s : s + 1],
        block_table=batch.block_table[s : s + 1],
    )


def batch_of(
    lens: list[int], query_lens: list[int], shared_blocks: int, num_blocks: int
) -> AttentionBatch:
    """`make_batch`, or one whose sequences begin with the same blocks."""
    if not shared_blocks:
        return make_batch(lens, query_lens, num_blocks)
    one, size, own = make_batch(lens[:1], query_lens[:1], num_blocks), len(lens), query_lens[0]
    own_blocks = -(-(lens[0] - shared_blocks * BLOCK) // BLOCK)
    used = set(one.block_table[0, :shared_blocks].tolist())
    free = [block for block in range(num_blocks) if block not in used][: size * own_blocks]
    tails = torch.tensor(free, dtype=torch.int32, device="cuda").view(size, own_blocks)
    heads = one.block_table[:1, :shared_blocks].expand(size, -1)
    return AttentionBatch(
        positions_T=one.positions_T.repeat(size),
        slot_mapping_T=torch.zeros(size * own, dtype=torch.int64, device="cuda"),
        query_starts=torch.arange(size + 1, dtype=torch.int32, device="cuda") * own,
        seq_lens_S=torch.tensor(lens, dtype=torch.int32, device="cuda"),
        block_table=torch.cat((heads, tails), 1).contiguous(),
    )
