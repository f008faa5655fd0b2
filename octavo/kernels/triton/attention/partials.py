"""Partial results of attention over splits of keys, and how they become one by log-sum-exp.

Left by every kernel that cuts keys into splits, merged by the last of a row's programs (decode.py)
or by a kernel of its own (short_chunks.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.facts import LARGEST_SPLIT, SPLIT_CLASSES, split_partials
from octavo.kernels.triton.tiles.softmax import with_sinks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partials:
    """Where splits leave their results: out [partials * H, D] and log2-sum-exp2 [partials * H].

    Row r has partials [starts[r], starts[r + 1]), or, without starts, [r * num_partials,
    (r + 1) * num_partials), H times: those of head 0 in order, then those of head 1, and so on.
    """

    out: Tensor
    lse: Tensor
    num_partials: int
    starts: Tensor | None = None


def make_partials(
    q_THD: Tensor,
    num_partials: int,
    starts: Tensor | None = None,
    total_partials: int | None = None,
) -> Partials:
    """Returns uninitialised room for `num_partials` partial results of every row, or for
    `total_partials` of all rows, which go with `starts` or with another number of rows."""
    num_tokens, num_heads, head_size = q_THD.shape
    rows = num_heads * (num_tokens * num_partials if total_partials is None else total_partials)
    return Partials(
        out=torch.empty((rows, head_size), dtype=torch.float32, device=q_THD.device),
        lse=torch.empty(rows, dtype=torch.float32, device=q_THD.device),
        num_partials=num_partials,
        starts=starts,
    )


def partial_counts(seq_lens: np.ndarray, window: int | None) -> np.ndarray:
    """Returns how many partial results the single query of each sequence leaves at most, for
    partial_starts_S.

    Never less for longer sequences or windows: bounds of the lengths serve as well, and the counts
    without a window serve windowed layers too.
    """
    visible = seq_lens if window is None else np.minimum(seq_lens, window)
    counts = -(-visible // LARGEST_SPLIT)
    for limit, size in SPLIT_CLASSES:
        counts = np.maximum(counts, -(-np.minimum(visible, limit) // size))
    return counts + 1  # The first split of a window may begin within.


def max_total_partials(max_seqs: int, max_seq_len: int, kv_tokens: int) -> int:
    """Returns a bound of the sum of `partial_counts` over up to `max_seqs` sequences of up to
    `max_seq_len` tokens that have `kv_tokens` together.

    Sequences that share blocks may have more tokens together than the cache has.
    """
    mean = min(max_seq_len, kv_tokens / max_seqs)
    # Splits against tokens lie below a concave line, so equal lengths need most; it goes through
    # (limit, limit / size) of every class.
    splits = min(mean / 64, mean / 192 + 32 / 3, mean / 384 + 64 / 3, mean / 512 + 32)
    return min(max_seqs * split_partials(max_seq_len), int(max_seqs * (splits + 2)))


@triton.jit
def partials_of(row, starts, num_partials, heads, H: tl.constexpr, PACKED: tl.constexpr):
    """Returns the first partial result of each of `heads` of a row: see `Partials`."""
    first = row.to(tl.int64) * num_partials
    if PACKED:
        first = tl.load(starts + row).to(tl.int64)
        num_partials = tl.load(starts + row + 1) - first
    return first * H + heads * num_partials


@triton.jit
def merge_heads(
    partial_out,
    partial_lse,
    firsts,
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
    over its partials firsts[h] .. firsts[h] + count, ROWS // HEADS at a time. One that saw
    nothing (lse -inf) adds nothing. HAS_SINKS: and over sinks[heads], which have no value."""
    HEADS: tl.constexpr = firsts.shape[0]
    SLOTS: tl.constexpr = ROWS // HEADS if ROWS > HEADS else 1
    offs_d = tl.arange(0, BLOCK_D)
    offs_i = tl.arange(0, SLOTS)
    top = tl.full([HEADS, SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS, SLOTS], tl.float32)
    acc = tl.zeros([HEADS, SLOTS, BLOCK_D], tl.float32)
    for start in tl.range(0, count, SLOTS, loop_unroll_factor=8):
        at = firsts[:, None] + (start + offs_i)[None, :]
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
    partial_starts,
    num_partials,
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
    firsts = partials_of(row, partial_starts, num_partials, head, H, PACKED)
    mean = merge_heads(
        *(partial_out, partial_lse, firsts, count, is_head, sinks, head),
        *(D, HAS_SINKS, ROWS, BLOCK_D),
    )
    offs_d = tl.arange(0, BLOCK_D)
    at = (t * H + head)[:, None] * D + offs_d[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=is_head[:, None] & (offs_d < D)[None, :])
