"""Causal paged attention of a mixed step: tiles of queries here, single queries split over KV.

Called by the Triton back end once a layer. Neither reads slots no query may see nor asks the
device anything: grids are upper bounds, and programs without work leave at once.

Which kernel computes a row depends on how many queries its own sequence has in this step: one
(KV split by position), up to SHORT_QUERIES (tiles, KV split so that all processors have work), or
more (tiles, KV in one run); attention_hopper.py attends tiles where it fits. A row's bits are the
same in any batch, except in chunks of 2 to SHORT_QUERIES; in longer ones they are the same however
a prompt is cut. `deterministic` sends every row the first way, so that any chunk, decode and
recompute agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.ops import AttentionBatch, KVLayer
from octavo.kernels.triton.attention_decode import (
    LOG2_E,
    Partials,
    check_query,
    compute_dtype,
    decode_attention,
    make_partials,
    seq_len_bound,
)
from octavo.kernels.triton.launch import (
    KNOWN_TRITON,
    launchable,
    next_power_of_2,
    num_processors,
)
from octavo.kernels.triton.overlap import launch_options, wait_turn
from octavo.kernels.triton.short_chunks import (
    Limits,
    ShortPlan,
    ShortPlans,
    first_split,
    merge_short_chunks,
    sequence_of,
    split_of,
)
from octavo.kernels.triton.splits import tiling

if triton.__version__.startswith(KNOWN_TRITON):
    from octavo.kernels.triton import attention_hopper as hopper
else:  # Gluon is experimental: what another Triton has may not be what this kernel knows.
    hopper = None

SHORT_QUERIES = 64
"""Sequences with 2 to this many queries split their KV, to fill the chip."""
SHORT_SPLITS = 16
SHORTEST_SPLIT = 512
PARTIAL_TOKENS = 512
"""The buffer of partial results holds SHORT_SPLITS of so many tokens, or fewer of more."""

DETERMINISTIC_TOKENS = 256
"""Prompt tokens that share one buffer of partial results in the deterministic mode."""


@triton.jit
def attend_tiles(
    acc,
    m,
    total,
    q,
    position,
    key,
    value,
    table_row,
    low,
    start,
    end,
    stride_block,
    stride_token,
    scale_log2,
    window,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds positions [start, end) to the running softmax of q [BLOCK_M, BLOCK_D].

    Without MASKED every row sees the whole range, a multiple of BLOCK_N. Masked or not, the same
    operations run in the same order, and a tile a row sees nothing of leaves its bits alone.
    DELTA: elements from a key to its value, where one address can serve both (0: it cannot).
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    if DELTA > 0:
        value = key + DELTA
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + offs_n
        if MASKED:
            live = (n < end) & (n >= low)
            page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
        else:
            page = tl.load(table_row + n // P).to(tl.int64)
        at = (page * stride_block + (n % P) * stride_token)[:, None] + offs_d[None, :]
        if MASKED and D != BLOCK_D:
            mask = live[:, None] & (offs_d < D)[None, :]
            k = tl.load(key + at, mask=mask, other=0.0)
            v = tl.load(value + at, mask=mask, other=0.0)
        elif MASKED:
            k = tl.load(key + at, mask=live[:, None], other=0.0)
            v = tl.load(value + at, mask=live[:, None], other=0.0)
        elif D != BLOCK_D:
            k = tl.load(key + at, mask=(offs_d < D)[None, :], other=0.0)
            v = tl.load(value + at, mask=(offs_d < D)[None, :], other=0.0)
        else:
            k = tl.load(key + at)
            v = tl.load(value + at)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if MASKED:
            seen = live[None, :] & (n[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1) * scale_log2)
        floor = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s * scale_log2 - floor[:, None])
        shrink = tl.exp2(m - floor)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        m = higher
    return acc, m, total


@triton.jit
def attend_range(
    q,
    position,
    key,
    value,
    table_row,
    start,
    middle,
    end,
    stride_block,
    stride_token,
    scale_log2,
    window,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns softmax(scale q k^T) v over positions [start, end) as [BLOCK_M, BLOCK_D] and its
    log2-sum-exp2: 0 and -inf where a row sees none. Every row sees all of [start, middle), but for
    a window; both are multiples of BLOCK_N."""
    m = tl.full([q.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    low = start * 0
    if HAS_WINDOW:
        low = tl.maximum(tl.min(position, 0) - window + 1, 0)
        middle = tl.maximum(start, low // BLOCK_N * BLOCK_N)
    else:
        acc, m, total = attend_tiles(
            acc, m, total, q, position, key, value, table_row, low, start, middle,
            stride_block, stride_token, scale_log2, window,
            D, P, DELTA, False, HAS_WINDOW, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, m, total = attend_tiles(
        acc, m, total, q, position, key, value, table_row, low, middle, end,
        stride_block, stride_token, scale_log2, window,
        D, P, DELTA, True, HAS_WINDOW, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    return acc / total[:, None], m + tl.log2(total)


@launchable
@triton.jit(do_not_specialize=["num_sequences", "first_token"])
def _prefill_kernel(
    q,
    key,
    value,
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    block_table,
    table,
    num_sequences,
    stride_block,
    stride_table,
    scale_log2,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SHORT: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = softmax(scale q k^T + causal and window mask) v for one tile of queries.

    A tile is BLOCK_M // PADDED_GROUP queries of one sequence times the GROUP = H // K heads of kv
    head `program 0`: row r is query r // PADDED_GROUP, head r % PADDED_GROUP. q, out [T, H, D];
    key, value [B, P, K, D] with `stride_block`. Program 1 counts tiles from the last (the longest)
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
        first = first_split(length, num_queries, size, window, HAS_WINDOW)
        start = (first + tl.program_id(2)) * size
        end = tl.minimum(end, start + size)
        if start >= end:
            return
    at = ((first_row + query).to(tl.int64) * H + head)[:, None] * D + offs_d[None, :]
    mask = live[:, None] & (offs_d < D)[None, :]
    q_tile = tl.load(q + at, mask=mask, other=0.0)
    middle = tl.minimum(tl.maximum(computed + first_query + 1, start), end) // BLOCK_N * BLOCK_N
    mean, lse = attend_range(
        q_tile, position, key + kv_head * D, value + kv_head * D,
        block_table + sequence.to(tl.int64) * stride_table, start, middle, end,
        stride_block, K * D, scale_log2, window, D, P, DELTA, HAS_WINDOW, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if IS_SPLIT:
        parts = tl.cdiv(length, size) - first
        is_partial = parts > 1
        slot = tl.load(table + num_sequences + 1 + sequence).to(tl.int64) * H
        slot = slot + (query * H + head) * parts + tl.program_id(2)
        to = partial_out + slot[:, None] * D + offs_d[None, :]
        tl.store(to, mean, mask=mask & is_partial)
        tl.store(partial_lse + slot, lse, mask=live & is_partial)
        mask = mask & (parts < 2)
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)


def fits_hopper(q_THD: Tensor, layer: KVLayer, window: int | None) -> bool:
    """Whether attention_hopper.py is of use here and can take a layer."""
    return hopper is not None and hopper.fits(q_THD, layer, window)


def prefill_shape(head_size: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) of the tile kernel."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if head_size > 128 else (64, 32, 4, 2)
    if head_size <= 128:
        return 128, 64, 4, 3
    return 64, 64, 4, 2


def value_delta(layer: KVLayer) -> int:
    """Returns the elements from a key to its value where they are neighbours in the arena's page
    (the values' alignment is then the keys'), else 0."""
    page = layer.key[0].numel()
    apart = layer.value.data_ptr() - layer.key.data_ptr()
    return page if apart == page * layer.key.element_size() and page % 8 == 0 else 0


def prefill_attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    *,
    shape: tuple[int, int, int, int] | None = None,
) -> None:
    """Writes the rows of `out` [T, H * D] whose sequences have more than SHORT_QUERIES queries."""
    if len(q_THD):
        none = make_partials(q_THD[:0], 1)
        _tiles(q_THD, layer, batch, scale, window, out, none, None, len(q_THD), shape=shape)


def short_limits(num_tokens: int) -> Limits:
    """Returns what a plan of short chunks among `num_tokens` must keep to."""
    return Limits(
        queries=SHORT_QUERIES,
        splits=SHORT_SPLITS,
        shortest=SHORTEST_SPLIT,
        slots=min(num_tokens, PARTIAL_TOKENS) * SHORT_SPLITS,
    )


def short_attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    num_tokens: int,
    *,
    is_hopper: bool = False,
    plans: ShortPlans | None = None,
) -> None:
    """Writes the rows of `out` whose sequences have 2 to SHORT_QUERIES queries among the first
    `num_tokens`. `plans` remembers what the batch's other layers have planned."""
    limit = min(num_tokens, len(q_THD))
    partials = make_partials(q_THD[: min(PARTIAL_TOKENS, limit)], SHORT_SPLITS)
    tiles = tiling(q_THD.shape[1], layer.key.shape[2], num_processors(q_THD.device))
    plan = (plans or ShortPlans()).of(batch, tiles, window, short_limits(limit))
    if is_hopper:
        hopper.short_chunks(q_THD, layer, batch, scale, out, partials, plan, limit)
    else:
        _tiles(q_THD, layer, batch, scale, window, out, partials, plan, limit)
    merge_short_chunks(out, batch, window, plan, partials, limit)


def _tiles(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    partials: Partials,
    plan: ShortPlan | None,
    num_tokens: int,
    *,
    shape: tuple[int, int, int, int] | None = None,
) -> None:
    """One launch of the tile kernel, for sequences among the first `num_tokens`: short ones by
    their plan, or, without one, the long ones."""
    stride_block = check_query(q_THD, layer, batch)
    num_heads, head_size = q_THD.shape[1:]
    block_size, num_kv_heads = layer.key.shape[1:3]
    num_sequences = len(batch.seq_lens_S)
    dtype = compute_dtype(q_THD, layer)
    block_m, block_n, num_warps, num_stages = shape or prefill_shape(head_size, dtype)
    padded_group = next_power_of_2(num_heads // num_kv_heads)
    block_m = max(block_m, padded_group)
    tiles = num_tokens // (block_m // padded_group) + num_sequences
    _prefill_kernel[(num_kv_heads, tiles, 1 if plan is None else plan.limits.splits)](
        q_THD.to(dtype),
        layer.key,
        layer.value,
        out,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.block_table,
        batch.seq_lens_S if plan is None else plan.table,
        num_sequences,
        stride_block,
        batch.block_table.stride(0),
        scale * LOG2_E,
        0 if window is None else window,
        H=num_heads,
        K=num_kv_heads,
        D=head_size,
        P=block_size,
        DELTA=value_delta(layer),
        HAS_WINDOW=window is not None,
        IS_SPLIT=plan is not None,
        SHORT=SHORT_QUERIES,
        PADDED_GROUP=padded_group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THD.device),
    )


def attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    *,
    is_deterministic: bool = False,
    tickets: Tensor | None = None,
    plans: ShortPlans | None = None,
) -> Tensor:
    """Returns [T, H * D] in the dtype of q; see `Ops.attention`.

    A sequence of length 0 with one query (padding of a captured graph) gets zeros.
    """
    out = torch.empty_like(q_THD)
    bound = seq_len_bound(layer, batch)
    if is_deterministic and batch.max_query_len != 1:
        _every_row_as_decode(q_THD, layer, batch, scale, window, out, bound, tickets)
        return out.flatten(1)
    if batch.max_slots != 0:
        decode_attention(
            q_THD,
            layer,
            batch,
            scale,
            window,
            out,
            max_seq_len=bound,
            tickets=tickets,
            is_invariant=is_deterministic,
        )
    tiles_attention(q_THD, layer, batch, scale, window, out, plans=plans)
    return out.flatten(1)


def tiles_attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    *,
    plans: ShortPlans | None = None,
) -> None:
    """Writes the rows of `out` whose sequences have more than one query."""
    num_tokens = len(q_THD)
    longest = num_tokens if batch.max_query_len is None else batch.max_query_len
    short = num_tokens if batch.num_short_tokens is None else batch.num_short_tokens
    is_hopper = fits_hopper(q_THD, layer, window)
    if longest > 1 and short > 1:
        how = {"is_hopper": is_hopper, "plans": plans}
        short_attention(q_THD, layer, batch, scale, window, out, short, **how)
    if longest <= SHORT_QUERIES:
        return
    if is_hopper:
        hopper.long_chunks(q_THD, layer, batch, scale, out, SHORT_QUERIES)
    else:
        prefill_attention(q_THD, layer, batch, scale, window, out)


def _every_row_as_decode(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    max_seq_len: int,
    tickets: Tensor | None,
) -> None:
    num_tokens = len(q_THD)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=q_THD.device)
    sequences = torch.searchsorted(batch.query_starts[1:], tokens, right=True, out_int32=True)
    for start in range(0, num_tokens, DETERMINISTIC_TOKENS):
        rows = slice(start, start + DETERMINISTIC_TOKENS)
        part = AttentionBatch(
            positions_T=batch.positions_T[rows],
            slot_mapping_T=batch.slot_mapping_T[rows],
            query_starts=batch.query_starts,
            seq_lens_S=batch.seq_lens_S,
            block_table=batch.block_table,
        )
        decode_attention(
            q_THD[rows],
            layer,
            part,
            scale,
            window,
            out[rows],
            max_seq_len=max_seq_len,
            token_sequences=sequences[rows],
            tickets=tickets,
            is_invariant=True,
        )
