"""Split-KV attention of single queries: partial results per split, merged by log-sum-exp by
whichever program of a kv head ends last.

Called by `attention` for sequences with one query and by `shared_prefix` for private tails.
Where batch invariance was promised, a split is a fixed range of absolute positions whose size
depends on the row's own visible length alone; the grid only decides who computes it. Else every
program of a row takes one even split: fewer partial results to write and to merge.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.facts import LARGEST_SPLIT, SPLIT_CLASSES, split_partials
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.partials import (
    Partials,
    make_partials,
    merge_kv_head,
    partials_of,
)
from octavo.kernels.triton.attention.scores import most_visible, scores_of
from octavo.kernels.triton.attention.write import (
    kv_strides,
    rope_of_kv_head,
    rotation_arguments,
)
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last, make_tickets
from octavo.kernels.triton.tiles.softmax import capped, softmax_step, with_sinks
from octavo.kernels.triton.tiles.visible import first_visible

TARGET_PROGRAMS = 528
"""Programs that an H100 runs at once, in one wave; those of a row share its splits."""
MAX_REGISTERS = 128
"""Of a thread of the split kernel, which it needs for the splits; four programs then fit a
multiprocessor, where merging alone would take more."""
MERGE_ROWS = 2
"""Heads times partial results that `merge_heads` takes at a time; more cost the whole kernel
registers."""


@triton.jit
def _split_size(visible):
    """SPLIT_CLASSES on the device."""
    size = tl.where(visible <= 4096, 128, tl.where(visible <= 16384, 256, 512))
    return tl.where(visible <= 1024, 64, size)


@triton.jit
def splits_of(low, length, FIXED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns where the first split of [low, length) begins, their size and how many they are.
    FIXED: whatever the grid; else no more than there are programs."""
    size = _split_size(length - low)
    origin = low // size * size
    if not FIXED:
        origin = low // BLOCK_N * BLOCK_N
        even = tl.cdiv(length - origin, tl.num_programs(2))
        # Where rows fill the device alone, a short one is not worth a merge (32 of 96: 9.4 us by
        # four programs, 8.8 by three).
        size = tl.maximum(size, tl.where(tl.num_programs(2) < 8, 256, BLOCK_N))
        size = tl.maximum(size, tl.cdiv(even, BLOCK_N) * BLOCK_N)
    return origin, size, tl.cdiv(length - origin, size)


@launchable
@triton.jit(do_not_specialize=["num_partials"])
def _decode_kernel(
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    positions,
    shared_tokens,
    shared_partials,
    partial_starts,
    num_partials,
    tickets,
    q,
    key,
    value,
    token_sequences,
    block_table,
    stride_block,
    stride_table,
    scale_log2,
    cap_log2,
    reach,
    sinks,
    cache_slots,
    cos,
    sin,
    query_weight,
    key_weight,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    IS_QKV: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PACKED: tl.constexpr,
    FIXED: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The H // K query heads of kv head `program 0` of one token, a run of splits by `program 2`.

    out = softmax(scale q k^T) v over [low, len), for each split on its own (online over tiles of
    BLOCK_N): a row with one split writes `out` [T, H, D]; more write `partial_out` (normalised)
    and `partial_lse` (base 2), where `partials_of` the row are (its sequence's where PACKED), and
    the last of their programs merges them, MERGE_M >= H // K heads at once. FIXED: see `splits_of`.
    Program 1 names a token (BY_TOKEN: any query) or a sequence, skipped unless it has one query.
    HAS_SHARED: the first shared_tokens[s] tokens are done elsewhere, and left shared_partials[s].
    IS_QKV: q is qkv [T, (H + 2 K) D] before norm and RoPE, whose k and v are written on the way.
    """
    GROUP: tl.constexpr = H // K
    wait_turn(OVERLAP)
    announce(OVERLAP)
    if BY_TOKEN:
        t = tl.program_id(1).to(tl.int64)
        sequence = tl.load(token_sequences + t).to(tl.int64)
        length = tl.load(positions + t) + 1
    else:
        sequence = tl.program_id(1).to(tl.int64)
        t = tl.load(query_starts + sequence).to(tl.int64)
        beyond = tl.load(query_starts + sequence + 1)
        length = tl.load(seq_lens + sequence)
        if beyond - t != 1:
            return
    low, before = first_visible(length - 1, reach, VISIBLE), length * 0
    if HAS_SHARED:
        low = tl.maximum(low, tl.load(shared_tokens + sequence))
        before = tl.load(shared_partials + sequence)
    origin, size, count = splits_of(low, length, FIXED, BLOCK_N)
    kv_head, rows, offs_d = tl.program_id(0), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row_mask = (rows < GROUP)[:, None] & (offs_d < D)[None, :]
    heads = t * H + kv_head * GROUP + rows
    out_at = out + heads[:, None] * D + offs_d[None, :]
    if (count <= 0) & (before == 0) & (tl.program_id(2) == 0):
        zero = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
        tl.store(out_at, zero, mask=row_mask)
    share = tl.maximum(tl.cdiv(count, tl.num_programs(2)), 1)
    num_busy = tl.maximum(tl.cdiv(count, share), 1)
    if tl.program_id(2) >= num_busy:
        return
    begin = tl.program_id(2) * share
    stop = tl.minimum(begin + share, count)
    row = sequence if PACKED else t
    firsts = partials_of(row, partial_starts, num_partials, kv_head * GROUP + rows, H, PACKED)
    if IS_QKV:
        slot = tl.where(stop == count, tl.load(cache_slots + t), -1)
        q_tile = rope_of_kv_head(
            *(q + t * ((H + 2 * K) * D), kv_head, tl.maximum(length - 1, 0)),
            *(slot, key, value, stride_block, cos, sin, query_weight, key_weight, eps),
            *(H, K, D, P, HALF, HAS_NORM, BLOCK_M, BLOCK_D),
        )
    else:
        q_tile = tl.load(q + heads[:, None] * D + offs_d[None, :], mask=row_mask, other=0.0)
    table_row = block_table + sequence * stride_table
    key, value = key + kv_head * D, value + kv_head * D
    start = tl.maximum(origin + begin * size, low // BLOCK_N * BLOCK_N)
    end = tl.minimum(origin + stop * size, length)
    m, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + tl.arange(0, BLOCK_N)
        live = (n < end) & (n >= low)
        page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
        at = (page * stride_block + (n % P) * (K * D))[:, None] + offs_d[None, :]
        mask = live[:, None]
        if D != BLOCK_D:
            mask = mask & (offs_d < D)[None, :]
        k = tl.load(key + at, mask=mask, other=0.0).to(q_tile.dtype)
        s = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        if HAS_CAP:
            s = capped(s, scale_log2, cap_log2)
        s = tl.where(live[None, :], s, -float("inf"))
        p, m, total, acc = softmax_step(s, m, total, acc, scale_log2)
        v = tl.load(value + at, mask=mask, other=0.0).to(q_tile.dtype)
        acc = tl.dot(p.to(q_tile.dtype), v, acc, input_precision="ieee")
        done = tile + BLOCK_N >= end
        if FIXED:
            done = done | (((tile + BLOCK_N) & (size - 1)) == 0)
        if done:
            mean = acc / total[:, None]
            if (count == 1) & (before == 0):
                if HAS_SINKS:
                    at_sink = sinks + kv_head * GROUP + rows
                    mean = with_sinks(mean, m + tl.log2(total), at_sink, rows < GROUP)
                tl.store(out_at, mean.to(out.dtype.element_ty), mask=row_mask)
            else:
                to = firsts + before + (tile - origin) // size
                tl.store(partial_out + to[:, None] * D + offs_d[None, :], mean, mask=row_mask)
                tl.store(partial_lse + to, m + tl.log2(total), mask=rows < GROUP)
        m = tl.where(done, -float("inf"), m)
        total = tl.where(done, 0.0, total)
        acc = tl.where(done, 0.0, acc)
    if (count < 2) & (before == 0):
        return
    if is_last(tickets + tl.program_id(1) * K + kv_head, num_busy):
        merge_kv_head(
            *(out, partial_out, partial_lse, row, t, kv_head, partial_starts, num_partials),
            *(before + count, sinks, H, K, D, HAS_SINKS, PACKED, MERGE_M, MERGE_ROWS, BLOCK_D),
        )


def decode_shape(head_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns (BLOCK_N, num_warps, num_stages) of the split kernel."""
    if head_size > 128 or dtype == torch.float32:
        return 32, 4, 2
    return 64, 4, 2


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


def compute_dtype(q: Tensor, layer: KVLayer) -> torch.dtype:
    """Returns what the products multiply in: 16 bits where q and the cache agree, else float32."""
    return q.dtype if q.dtype == layer.key.dtype else torch.float32


def check_query(q_THD: Tensor, layer: KVLayer, batch: AttentionBatch) -> int:
    """Returns the arena's block stride, after checking the shapes attention relies on."""
    num_heads, head_size = q_THD.shape[1:]
    num_kv_heads = layer.key.shape[2]
    if head_size != layer.key.shape[3] or num_heads % num_kv_heads or head_size > 256:
        raise ValueError(
            f"{num_heads} query heads of size {head_size} do not fit {num_kv_heads} kv heads of "
            f"size {layer.key.shape[3]} (a multiple of them, size at most 256)"
        )
    if not q_THD.is_contiguous() or batch.block_table.stride(1) != 1:
        raise ValueError("queries and block table rows must be contiguous")
    return kv_strides(layer)


def seq_len_bound(layer: KVLayer, batch: AttentionBatch) -> int:
    """Returns what no length of the batch exceeds."""
    capacity = batch.block_table.shape[1] * layer.key.shape[1]
    bound = plan_of(batch).max_seq_len
    return capacity if bound is None else min(bound, capacity)


def decode_attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    *,
    max_seq_len: int,
    is_qkv: bool = False,
    token_sequences: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    partials: Partials | None = None,
    tickets: Tensor | None = None,
    is_invariant: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> None:
    """Writes the rows of `out` [T, H, D] that belong to sequences with one query. With
    `is_invariant` a row has the same bits in every batch.

    `max_seq_len` bounds seq_lens_S. `is_qkv`: q is qkv [T, H + 2 K, D] before norm (of each head)
    and rotation, and its k and v are written too. With `token_sequences` (int32 [T], the sequence
    of each token) it writes every row, each as if decoded. `shared` (tokens, partials; int32 [S])
    tells how much of every sequence already lies in `partials`. `tickets`: see `make_tickets`.
    """
    stride_block = check_query(out, layer, batch)
    num_tokens, num_heads, head_size = out.shape
    block_size, num_kv_heads = layer.key.shape[1:3]
    assert q_THD.is_contiguous()
    assert q_THD.shape[1] == num_heads + (2 * num_kv_heads if is_qkv else 0)
    rows = len(batch.seq_lens_S) if token_sequences is None else num_tokens
    if rows == 0 or num_tokens == 0:
        return
    unused = batch.seq_lens_S
    most = split_partials(most_visible(op.visibility, max_seq_len))
    scores = scores_of(op, unused)
    if partials is None:
        plan = plan_of(batch)
        partials = make_partials(out, most, plan.partial_starts_S, plan.max_partials)
    if tickets is None:
        tickets = make_tickets(q_THD.device)
    assert rows * num_kv_heads <= len(tickets), (rows, num_kv_heads)
    dtype = compute_dtype(q_THD, layer)
    block_n, num_warps, num_stages = shape or decode_shape(head_size, dtype)
    group = num_heads // num_kv_heads
    programs = min(most, max(1, TARGET_PROGRAMS // (rows * num_kv_heads)))
    # Heads are fastest: what they read of a page lies side by side in memory.
    _decode_kernel[(num_kv_heads, rows, programs)](
        out,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.positions_T,
        *(shared or (unused, unused)),
        unused if partials.starts is None else partials.starts,
        partials.num_partials,
        tickets,
        q_THD.to(dtype),
        layer.key,
        layer.value,
        unused if token_sequences is None else token_sequences,
        batch.block_table,
        stride_block,
        batch.block_table.stride(0),
        *scores.arguments,
        batch.slot_mapping_T,
        *rotation_arguments(op, unused),
        H=num_heads,
        K=num_kv_heads,
        D=head_size,
        P=block_size,
        IS_QKV=is_qkv,
        HALF=0 if op.rope is None or not is_qkv else op.rope.rotary_dim // 2,
        HAS_NORM=is_qkv and op.qk_norm is not None,
        BY_TOKEN=token_sequences is not None,
        **scores.constants,
        HAS_SHARED=shared is not None,
        PACKED=partials.starts is not None,
        FIXED=is_invariant,
        MERGE_M=next_power_of_2(group),
        MERGE_ROWS=MERGE_ROWS,
        BLOCK_M=max(16, next_power_of_2(group)),
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        num_warps=num_warps,
        num_stages=num_stages,
        **({"maxnreg": MAX_REGISTERS} if dtype.itemsize < 4 and head_size <= 128 else {}),
        **launch_options(q_THD.device),
    )
