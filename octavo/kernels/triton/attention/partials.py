"""Partial results of attention over splits of keys, and how they become one by log-sum-exp.

Left by every kernel that cuts keys into splits, merged by the last of a row's programs (decode.py)
or by a kernel of its own (short_chunks.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.tiles.softmax import with_sinks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partials:
    """Where splits leave their results: out [slots * H, D] and log2-sum-exp2 [slots * H].

    Row r has slots [starts[r], starts[r + 1]), or [r * num_slots, (r + 1) * num_slots) without
    starts, H times: those of head 0 in order, then those of head 1, and so on.
    """

    out: Tensor
    lse: Tensor
    num_slots: int
    starts: Tensor | None = None


def make_partials(
    q_THD: Tensor, num_slots: int, starts: Tensor | None = None, total_slots: int | None = None
) -> Partials:
    """Returns uninitialised room for `num_slots` partial results of every row, or, with `starts`,
    for `total_slots` of all rows."""
    num_tokens, num_heads, head_size = q_THD.shape
    rows = num_heads * (num_tokens * num_slots if total_slots is None else total_slots)
    return Partials(
        out=torch.empty((rows, head_size), dtype=torch.float32, device=q_THD.device),
        lse=torch.empty(rows, dtype=torch.float32, device=q_THD.device),
        num_slots=num_slots,
        starts=starts,
    )


@triton.jit
def slots_of(row, starts, num_slots, heads, H: tl.constexpr, PACKED: tl.constexpr):
    """Returns the first slot of each of `heads` of a row: see `Partials`."""
    first = row.to(tl.int64) * num_slots
    if PACKED:
        first = tl.load(starts + row).to(tl.int64)
        num_slots = tl.load(starts + row + 1) - first
    return first * H + heads * num_slots


@triton.jit
def merge_heads(
    partial_out,
    partial_lse,
    slots,
    count,
    is_head,
    sinks,
    heads,
    D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns [HEADS, BLOCK_D]: for each head sum_i w_i o_i / sum_i w_i, w_i = 2^(lse_i - max lse),
    over its slots slots[h] .. slots[h] + count, ROWS // HEADS slots at a time. A slot that saw
    nothing (lse -inf) adds nothing. HAS_SINKS: and over sinks[heads], which have no value."""
    HEADS: tl.constexpr = slots.shape[0]
    SLOTS: tl.constexpr = ROWS // HEADS if ROWS > HEADS else 1
    offs_d = tl.arange(0, BLOCK_D)
    offs_i = tl.arange(0, SLOTS)
    top = tl.full([HEADS, SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS, SLOTS], tl.float32)
    acc = tl.zeros([HEADS, SLOTS, BLOCK_D], tl.float32)
    for start in tl.range(0, count, SLOTS, loop_unroll_factor=8):
        at = slots[:, None] + (start + offs_i)[None, :]
        live = is_head[:, None] & (start + offs_i < count)[None, :]
        lse = tl.load(partial_lse + at, mask=live, other=-float("inf"), cache_modifier=".cg")
        mask = live[:, :, None] & (offs_d < D)[None, None, :]
        part_at = partial_out + at[:, :, None] * D + offs_d[None, None, :]
        part = tl.load(part_at, mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, lse)
        floor = tl.where(higher == -float("inf"), 0.0, higher)
        w = tl.exp2(lse - floor)
        shrink = tl.exp2(top - floor)
        part = tl.where(w[:, :, None] > 0, part * w[:, :, None], 0.0)
        acc = acc * shrink[:, :, None] + part
        total = total * shrink + w
        top = higher
    highest = tl.max(top, 1)
    w = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest)[:, None])
    whole = tl.sum(total * w, 1)
    mean = tl.sum(acc * w[:, :, None], 1) / tl.where(whole > 0, whole, 1.0)[:, None]
    if HAS_SINKS:
        mean = with_sinks(mean, highest + tl.log2(whole), sinks + heads, is_head)
    return mean


@triton.jit
def merge_kv_head(
    out,
    partial_out,
    partial_lse,
    row,
    t,
    kv_head,
    slot_starts,
    num_slots,
    count,
    sinks,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PACKED: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t, h] = `merge_heads` of the query heads h of one kv head, HEADS >= H // K."""
    lane = tl.arange(0, HEADS)
    head = kv_head * (H // K) + lane
    is_head = lane < H // K
    slots = slots_of(row, slot_starts, num_slots, head, H, PACKED)
    mean = merge_heads(
        *(partial_out, partial_lse, slots, count, is_head, sinks, head),
        *(D, HAS_SINKS, ROWS, BLOCK_D),
    )
    offs_d = tl.arange(0, BLOCK_D)
    at = (t * H + head)[:, None] * D + offs_d[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=is_head[:, None] & (offs_d < D)[None, :])
