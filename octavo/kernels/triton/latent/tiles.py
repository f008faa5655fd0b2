"""Latent attention in tiles of queries: absorbed for chunks of few queries, expanded for prompts.

Absorbed, a query meets latent vectors as they lie in the pages: `RANK` columns a score and a sum,
all heads of a token in one tile. Expanded, every head has keys and values of its own, multiplied
out once a step, of a fraction of the columns: cheaper where many queries meet each key. The rotated
columns come from the pages in both. Sums are those of attention/tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.attention.short_chunks import ShortPlan, sequence_of, split_of
from octavo.kernels.triton.attention.splits import LATENT_ROWS
from octavo.kernels.triton.latent.pages import LatentPlane, latent_scores, latent_tile
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import add_values, load_rows
from octavo.kernels.triton.tiles.softmax import joined, softmax_step


@triton.jit
def attend_latent(
    acc,
    m,
    total,
    q,
    q_rope,
    position,
    plane,
    table_row,
    keys,
    values,
    rotated,
    start,
    end,
    stride_dense,
    stride_rotated,
    scale_log2,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    ABSORBED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Adds positions [start, end) to the running softmax of q [BLOCK_M, BLOCK_D] and q_rope.

    ABSORBED: D = V = RANK, keys and values are the latent vectors of the plane's pages; else
    position n has its key at keys + n * stride_dense [D], its value at values + n * stride_dense
    [V] and its rotated columns at rotated + n * stride_rotated. Without MASKED every row sees the
    whole range.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + offs_n
        live = n < end
        if ABSORBED:
            page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
            k, r = latent_tile(
                plane, page, n % P, live, q.dtype, RANK, ROPE, FORMAT, BLOCK_D, BLOCK_E
            )
            s = latent_scores(q, q_rope, k, r, plane, page, n % P, live, FORMAT)
        else:
            there = n.to(tl.int64)
            r = load_rows(rotated, there * stride_rotated, live, ROPE, True, BLOCK_E)
            k = load_rows(keys, there * stride_dense, live, D, True, BLOCK_D)
            v = load_rows(values, there * stride_dense, live, V, True, BLOCK_V)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            s = tl.dot(q_rope, tl.trans(r.to(q.dtype)), s, input_precision="ieee")
        if MASKED:
            seen = live[None, :] & (n[None, :] <= position[:, None])
            s = tl.where(seen, s, -float("inf"))
        p, m, total, acc = softmax_step(s, m, total, acc, scale_log2)
        if ABSORBED:
            acc = add_values(acc, p, k, plane, page, n % P, live, 2, FORMAT, True)
        else:
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return acc, m, total


UNSPECIALISED = ["num_sequences", "short", "first_position", "num_positions", "has_before"]


@launchable
@triton.jit(do_not_specialize=UNSPECIALISED)
def _latent_chunk_kernel(
    q,
    q_rotated,
    stride_q,
    stride_qh,
    stride_r,
    stride_rh,
    pages,
    scales,
    stride_block,
    stride_scales,
    keys,
    values,
    rotated,
    lows,
    ends,
    dense_starts,
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    block_table,
    table,
    num_sequences,
    short,
    first_position,
    num_positions,
    has_before,
    stride_table,
    stride_dense,
    stride_head,
    stride_rotated,
    scale_log2,
    H: tl.constexpr,
    STACK: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    ABSORBED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile: BLOCK_M // STACK queries of a sequence times STACK heads (group `program 0`).

    q [T, H, D], q_rotated [T, H, ROPE] with strides, out [T, H, V]; tiles are counted as in
    attention/tiles.py, and so are splits (IS_SPLIT: chunks of 2 to `short` queries, by a plan).
    Else chunks of more queries, of sequence s with dense_starts[s] >= 0 num_positions keys from
    lows[s] + first_position on alone, up to ends[s], and partial_lse [T, H] is told their
    log2-sum-exp2; `has_before`: out and partial_lse hold what was attended before, and get both
    together. Not ABSORBED: the first of those has its keys, values and rotated columns at row
    dense_starts[s] of keys [N, H, D], values [N, H, V], whose strides are equal, and rotated
    [N, ROPE]; pages are not read.
    """
    QUERIES: tl.constexpr = BLOCK_M // STACK
    wait_turn(OVERLAP)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = sequence_of(query_starts, num_sequences, tile, QUERIES)
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    first_query = (tile - (first_row // QUERIES + sequence)) * QUERIES
    length = tl.load(seq_lens + sequence)
    is_short = num_queries <= short
    if (first_query >= num_queries) | (num_queries < 2) | (is_short != IS_SPLIT):
        return
    computed = length - num_queries
    group = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    offs_d, offs_v, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_E)
    query = first_query + rows // STACK
    head = group * STACK + rows % STACK
    live = query < num_queries
    last_query = tl.minimum(first_query + QUERIES, num_queries) - 1
    position = computed + tl.minimum(query, last_query)
    end = computed + last_query + 1
    start = first_query * 0
    if IS_SPLIT:
        size = split_of(table, num_sequences)
        start = tl.program_id(2) * size
        end = tl.minimum(end, start + size)
        if start >= end:
            return
    else:
        dense_start = tl.load(dense_starts + sequence)
        if dense_start < 0:
            return
        start = tl.load(lows + sequence) + first_position
        last = tl.minimum(tl.load(ends + sequence), start + num_positions)
        end = tl.maximum(tl.minimum(end, last), start)
    token = (first_row + query).to(tl.int64)
    row = (token * H + head)[:, None]
    mask_d = live[:, None] & (offs_d < D)[None, :]
    q_at = q + (token * stride_q + head * stride_qh)[:, None]
    q_tile = tl.load(q_at + offs_d[None, :], mask=mask_d, other=0.0)
    mask_e = live[:, None] & (offs_e < ROPE)[None, :]
    r_at = q_rotated + (token * stride_r + head * stride_rh)[:, None]
    q_rope = tl.load(r_at + offs_e[None, :], mask=mask_e, other=0.0)
    if not ABSORBED:
        shift = dense_start.to(tl.int64) - start
        keys += shift * stride_dense + group * stride_head
        values += shift * stride_dense + group * stride_head
        rotated += shift * stride_rotated
    plane = (pages, scales, stride_block, stride_scales, 0)
    table_row = block_table + sequence.to(tl.int64) * stride_table
    middle = tl.minimum(tl.maximum(computed + first_query + 1, start), end)
    middle = start + (middle - start) // BLOCK_N * BLOCK_N
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc, m, total = attend_latent(
        acc, m, total, q_tile, q_rope, position, plane, table_row, keys, values, rotated,
        start, middle, stride_dense, stride_rotated, scale_log2,
        FORMAT, RANK, ROPE, D, V, P, ABSORBED, False,
        BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_E,
    )  # fmt: skip
    acc, m, total = attend_latent(
        acc, m, total, q_tile, q_rope, position, plane, table_row, keys, values, rotated,
        middle, end, stride_dense, stride_rotated, scale_log2,
        FORMAT, RANK, ROPE, D, V, P, ABSORBED, True,
        BLOCK_N, BLOCK_D, BLOCK_V, BLOCK_E,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    mean, lse = acc / total[:, None], m + tl.log2(total)
    at = row * V + offs_v[None, :]
    mask = live[:, None] & (offs_v < V)[None, :]
    if IS_SPLIT:
        parts = tl.cdiv(length, size)
        is_partial = parts > 1
        place = tl.load(table + num_sequences + 1 + sequence).to(tl.int64) * H
        place = place + (query * H + head) * parts + tl.program_id(2)
        tl.store(partial_out + place[:, None] * V + offs_v[None, :], mean, mask=mask & is_partial)
        tl.store(partial_lse + place, lse, mask=live & is_partial)
        mask = mask & (parts < 2)
    else:
        lse_at = partial_lse + token * H + head
        if has_before:
            lse_before = tl.load(lse_at, mask=live, other=-float("inf"))
            before = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
            mean, lse = joined(mean, lse, before, lse_before)
        tl.store(lse_at, lse, mask=live)
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)


def absorbed_shape(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) of tiles over latent vectors."""
    return (16, 16, 4, 1) if dtype == torch.float32 else (LATENT_ROWS, 64, 8, 2)


def expanded_shape(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) of tiles over heads' own keys."""
    return (32, 32, 4, 1) if dtype == torch.float32 else (128, 64, 8, 3)


def stack_of(num_heads: int, block_m: int) -> int:
    """Returns the heads that are rows of one tile: the largest power of two that divides them and
    fits."""
    return min(num_heads & -num_heads, block_m)


def absorbed_chunks(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    out_THR: Tensor,
    partials: Partials,
    plan: ShortPlan,
    num_tokens: int,
) -> None:
    """Attends the short chunks of a plan, all among the first `num_tokens`: to `out` [T, H, rank]
    what is in one split, else to `partials`. Shapes as `latent_decode` takes them."""
    assert q_THC.is_contiguous()
    num_heads, num_sequences, rank = q_THC.shape[1], len(batch.seq_lens_S), plane.rank
    dtype = plane.dtype_with(q_THC)
    q_THC = q_THC.to(dtype)
    block_m, block_n, num_warps, num_stages = absorbed_shape(dtype)
    stack = stack_of(num_heads, block_m)
    tiles = num_tokens // (block_m // stack) + num_sequences
    block_d = max(16, next_power_of_2(rank))
    unused = plane.numbers
    _latent_chunk_kernel[(num_heads // stack, tiles, plan.limits.splits)](
        *_query_arguments(q_THC[..., :rank], q_THC[..., rank:]),
        *plane.arguments,
        *(unused, unused, unused, *[batch.seq_lens_S] * 3),
        *(out_THR, partials.out, partials.lse),
        *(batch.query_starts, batch.seq_lens_S, batch.block_table, plan.table),
        *(num_sequences, plan.limits.queries, 0, 0, 0),
        *(batch.block_table.stride(0), 0, 0, 0, scale * LOG2_E),
        H=num_heads,
        STACK=stack,
        **plane.constants,
        D=rank,
        V=rank,
        ABSORBED=True,
        IS_SPLIT=True,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_V=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THC.device),
    )


def _query_arguments(q_THD: Tensor, rotated_THE: Tensor) -> tuple[Tensor | int, ...]:
    assert q_THD.stride(2) == rotated_THE.stride(2) == 1
    return (q_THD, rotated_THE, *q_THD.stride()[:2], *rotated_THE.stride()[:2])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunks:
    """Sequences whose queries meet keys that have been multiplied out. int32 tensors."""

    query_starts: Tensor
    """[sequences + 1]"""
    seq_lens: Tensor
    """Tokens that the last query of each sees, itself among them."""
    lows: Tensor
    """The position that a range of keys counts from."""
    ends: Tensor
    """Keys from this position on are not there, whoever might see them."""
    dense_starts: Tensor
    """The row of keys and values of the first in the range; < 0: the sequence takes no part."""
    short: int
    """Sequences of so many queries, or fewer, take none either."""


def expanded_chunks(
    q_parts: tuple[Tensor, Tensor],
    plane: LatentPlane,
    keys_NHD: Tensor,
    values_NHV: Tensor,
    rotated_NE: Tensor,
    chunks: Chunks,
    scale: float,
    out_THV: Tensor,
    lse_TH: Tensor,
    positions: tuple[int, int],
    *,
    has_before: bool = False,
) -> None:
    """Attends chunks over keys at positions [first, beyond), counted from `lows`, alone.

    q_parts [T, H, D] and [T, H, rotated columns], rows may be apart; of the plane only sizes are
    asked. Writes means to `out` and log2-sum-exp2 to `lse` float32: `has_before`, together with
    what is there already.
    """
    (num_tokens, num_heads, _), num_sequences = q_parts[0].shape, len(chunks.seq_lens)
    head_size, value_size = keys_NHD.shape[2], values_NHV.shape[2]
    assert keys_NHD.stride() == values_NHV.stride()
    assert keys_NHD.stride(2) == rotated_NE.stride(1) == 1
    dtype, unused = keys_NHD.dtype, chunks.seq_lens
    block_m, block_n, num_warps, num_stages = expanded_shape(dtype)
    tiles = num_tokens // block_m + num_sequences
    first, beyond = positions
    _latent_chunk_kernel[(num_heads, tiles, 1)](
        *_query_arguments(*(part.to(dtype) for part in q_parts)),
        *plane.arguments,
        *(keys_NHD, values_NHV, rotated_NE, chunks.lows, chunks.ends, chunks.dense_starts),
        *(out_THV, lse_TH, lse_TH),
        *(chunks.query_starts, chunks.seq_lens, unused, unused),
        *(num_sequences, chunks.short, first, beyond - first, int(has_before), 0),
        *(keys_NHD.stride(0), keys_NHD.stride(1), rotated_NE.stride(0), scale * LOG2_E),
        H=num_heads,
        STACK=1,
        **plane.constants,
        D=head_size,
        V=value_size,
        ABSORBED=False,
        IS_SPLIT=False,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        BLOCK_V=max(16, next_power_of_2(value_size)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(out_THV.device),
    )
