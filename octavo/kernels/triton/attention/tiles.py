"""Causal attention in tiles of queries, portable: one tile meets the keys that it sees, or a split.

Called by choose.py for sequences with several queries; shared.py stacks its own tiles
over `attend_range`. Neither reads slots no query may see nor asks the device anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.scores import scores_of
from octavo.kernels.triton.attention.short_chunks import (
    ShortPlan,
    first_split,
    sequence_of,
    split_of,
)
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import (
    add_values,
    both_planes,
    key_scores,
    kv_tile,
    plane_of_head,
)
from octavo.kernels.triton.tiles.softmax import capped, softmax_step, with_sinks
from octavo.kernels.triton.tiles.visible import first_visible


@triton.jit
def attend_tiles(
    acc,
    m,
    total,
    q,
    position,
    keys,
    values,
    table_row,
    low,
    start,
    end,
    scale_log2,
    cap_log2,
    reach,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    MASKED: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds positions [start, end) to the running softmax of q [BLOCK_M, BLOCK_D].

    Without MASKED every row sees the whole range, a multiple of BLOCK_N. Masked or not, the same
    operations run in the same order, and a tile a row sees nothing of leaves its bits alone.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + offs_n
        live = n < end
        if MASKED:
            live = live & (n >= low)
            page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
        else:
            page = tl.load(table_row + n // P).to(tl.int64)
        k = kv_tile(keys, page, n % P, live, q.dtype, K * D, D, KEY, MASKED, BLOCK_D)
        v = kv_tile(values, page, n % P, live, q.dtype, K * D, D, VALUE, MASKED, BLOCK_D)
        s = key_scores(q, k, keys, page, n % P, live, K, KEY, MASKED)
        if HAS_CAP:
            s = capped(s, scale_log2, cap_log2)
        if MASKED:
            seen = live[None, :] & (n[None, :] <= position[:, None])
            if VISIBLE > 0:
                seen = seen & (n[None, :] >= first_visible(position, reach, VISIBLE)[:, None])
            s = tl.where(seen, s, -float("inf"))
        p, m, total, acc = softmax_step(s, m, total, acc, scale_log2)
        acc = add_values(acc, p, v, values, page, n % P, live, K, VALUE, MASKED)
    return acc, m, total


@triton.jit
def attend_range(
    q,
    position,
    kv_head,
    keys,
    values,
    table_row,
    start,
    middle,
    end,
    scale_log2,
    cap_log2,
    reach,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns softmax(scale q k^T) v over positions [start, end) as [BLOCK_M, BLOCK_D] and its
    log2-sum-exp2: 0 and -inf where a row sees none. Every row sees all of [start, middle), but for
    windows and chunks; both are multiples of BLOCK_N. DELTA: numbers from a key to its value, where
    one address can serve both (0: it cannot)."""
    keys, values = plane_of_head(keys, kv_head, D, KEY), plane_of_head(values, kv_head, D, VALUE)
    if DELTA > 0:
        values = (keys[0] + DELTA, values[1], keys[2], values[3], values[4])
    m = tl.full([q.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    low = start * 0
    if VISIBLE > 0:
        low = first_visible(tl.min(position, 0), reach, VISIBLE)
        middle = tl.maximum(start, low // BLOCK_N * BLOCK_N)
    else:
        acc, m, total = attend_tiles(
            acc, m, total, q, position, keys, values, table_row, low, start, middle,
            scale_log2, cap_log2, reach,
            KEY, VALUE, K, D, P, False, VISIBLE, HAS_CAP, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, m, total = attend_tiles(
        acc, m, total, q, position, keys, values, table_row, low, middle, end,
        scale_log2, cap_log2, reach,
        KEY, VALUE, K, D, P, True, VISIBLE, HAS_CAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    return acc / total[:, None], m + tl.log2(total)


@launchable
@triton.jit(do_not_specialize=["num_sequences"])
def _prefill_kernel(
    q,
    key,
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    block_table,
    table,
    num_sequences,
    stride_table,
    scale_log2,
    cap_log2,
    reach,
    sinks,
    H: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SHORT: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = softmax(scale q k^T, causal and as VISIBLE says) v for one tile of queries.

    A tile is BLOCK_M // PADDED_GROUP queries of one sequence times the GROUP = H // K heads of kv
    head `program 0`: row r is query r // PADDED_GROUP, head r % PADDED_GROUP. q, out [T, H, D];
    key, value [B, P, K, D], in their formats. Program 1 counts tiles from the last (the longest)
    to the first; sequence s owns those from query_starts[s] // queries + s on.
    Sequences with more than SHORT queries; IS_SPLIT: those with 2 to SHORT, and of their keys the
    `program 2`-th split of a plan (`ShortPlan.table`), to partial_out unless it is the only one.
    """
    GROUP: tl.constexpr = H // K
    QUERIES: tl.constexpr = BLOCK_M // PADDED_GROUP
    wait_turn(OVERLAP)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = sequence_of(query_starts, num_sequences, tile, QUERIES)
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    first_query = (tile - (first_row // QUERIES + sequence)) * QUERIES
    length = tl.load(seq_lens + sequence)
    is_short = num_queries <= SHORT
    if (first_query >= num_queries) | (num_queries < 2) | (is_short != IS_SPLIT):
        return
    computed = length - num_queries
    kv_head = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    query = first_query + rows // PADDED_GROUP
    head = kv_head * GROUP + rows % PADDED_GROUP
    live = (query < num_queries) & (rows % PADDED_GROUP < GROUP)
    last_query = tl.minimum(first_query + QUERIES, num_queries) - 1
    position = computed + tl.minimum(query, last_query)
    start = first_query * 0
    end = computed + last_query + 1
    if IS_SPLIT:
        size = split_of(table, num_sequences)
        first = first_split(length, num_queries, size, reach, VISIBLE)
        start = (first + tl.program_id(2)) * size
        end = tl.minimum(end, start + size)
        if start >= end:
            return
    at = ((first_row + query).to(tl.int64) * H + head)[:, None] * D + offs_d[None, :]
    mask = live[:, None] & (offs_d < D)[None, :]
    q_tile = tl.load(q + at, mask=mask, other=0.0)
    middle = tl.minimum(tl.maximum(computed + first_query + 1, start), end) // BLOCK_N * BLOCK_N
    keys, values = both_planes(
        *(key, key_scale, stride_key, stride_key_scale),
        *(value, value_scale, stride_value, stride_value_scale, KEY, VALUE),
    )
    mean, lse = attend_range(
        q_tile, position, kv_head, keys, values,
        block_table + sequence.to(tl.int64) * stride_table, start, middle, end,
        scale_log2, cap_log2, reach,
        KEY, VALUE, K, D, P, DELTA, VISIBLE, HAS_CAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    whole = mean
    if HAS_SINKS:
        whole = with_sinks(mean, lse, sinks + head, live)
    if IS_SPLIT:
        parts = tl.cdiv(length, size) - first
        is_partial = parts > 1
        place = tl.load(table + num_sequences + 1 + sequence).to(tl.int64) * H
        place = place + (query * H + head) * parts + tl.program_id(2)
        to = partial_out + place[:, None] * D + offs_d[None, :]
        tl.store(to, mean, mask=mask & is_partial)
        tl.store(partial_lse + place, lse, mask=live & is_partial)
        mask = mask & (parts < 2)
    tl.store(out + at, whole.to(out.dtype.element_ty), mask=mask)


def prefill_shape(
    head_size: int, dtype: torch.dtype, *, is_plain: bool = True
) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) of the tile kernel, over keys and values
    that are plain numbers or not."""
    if not is_plain and dtype != torch.float32:
        return (128 if head_size <= 128 else 64), 64, 8, 2
    if dtype == torch.float32:
        return (32, 32, 4, 1) if head_size > 128 else (64, 32, 4, 2)
    if head_size <= 128:
        return 128, 64, 4, 3
    return 64, 64, 4, 2


def attend_in_tiles(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    partials: Partials,
    plan: ShortPlan | None,
    num_tokens: int,
    *,
    short: int,
    shape: tuple[int, int, int, int] | None = None,
) -> None:
    """Attends sequences among the first `num_tokens`: those with 2 to `short` queries by their plan
    (to `out` what is in one split, else to `partials`), or, without one, those with more."""
    planes = planes_of(q_THD, layer, batch)
    num_heads, head_size = q_THD.shape[1:]
    num_kv_heads, dtype = planes.num_heads, planes.dtype
    num_sequences = len(batch.seq_lens_S)
    block_m, block_n, num_warps, num_stages = shape or prefill_shape(
        head_size, dtype, is_plain=planes.is_plain
    )
    padded_group = next_power_of_2(num_heads // num_kv_heads)
    block_m = max(block_m, padded_group)
    tiles = num_tokens // (block_m // padded_group) + num_sequences
    scores = scores_of(op, batch.seq_lens_S)
    _prefill_kernel[(num_kv_heads, tiles, 1 if plan is None else plan.limits.splits)](
        q_THD.to(dtype),
        *planes.arguments,
        out,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.block_table,
        batch.seq_lens_S if plan is None else plan.table,
        num_sequences,
        batch.block_table.stride(0),
        *scores.arguments,
        H=num_heads,
        **planes.constants,
        DELTA=planes.value_delta,
        **scores.constants,
        IS_SPLIT=plan is not None,
        SHORT=short,
        PADDED_GROUP=padded_group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THD.device),
    )
