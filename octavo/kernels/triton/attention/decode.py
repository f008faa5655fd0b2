"""Split-KV attention of single queries: partial results per split, merged by log-sum-exp by
whichever program of a kv head ends last.

Called by `attention` for sequences with one query and by `shared_prefix` for private tails.
Where batch invariance was promised, a split is a fixed range of absolute positions whose size
depends on the row's own visible length alone; the grid only decides who computes it. Else every
program of a row takes one even split: fewer partial results to write and to merge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.kv_codec import stored_format
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.hopper import lone
from octavo.kernels.triton.attention.partials import Partials, merge_kv_head, partials_of
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.rows import (
    row_of_program,
    run_of_program,
    splits_of,
    store_split,
)
from octavo.kernels.triton.attention.scores import scores_of
from octavo.kernels.triton.attention.single_rows import SingleRows, most_partials, room_for
from octavo.kernels.triton.attention.write import (
    quantizing_of,
    rope_of_kv_head,
    rotation_arguments,
)
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last, make_tickets
from octavo.kernels.triton.tiles.kv import (
    add_values,
    both_planes,
    key_scores,
    kv_tile,
    plane_of_head,
)
from octavo.kernels.triton.tiles.softmax import capped, softmax_step
from octavo.kernels.triton.tiles.visible import first_visible

TARGET_PROGRAMS = 528
"""Four for each processor of an H100."""
MERGE_ROWS = 2
"""Heads times partial results that `merge_heads` takes at a time; more cost the whole kernel
registers."""


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
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    token_sequences,
    block_table,
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
    given_key,
    given_value,
    key_shift,
    key_factor,
    H: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    IS_QKV: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
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
    BLOCK_N): a row with one split writes `out` [T, H, D]; more write `partial_out` and
    `partial_lse` (base 2), where `partials_of` the row are, and the last of their programs merges
    them, MERGE_M heads at once. FIXED: see `splits_of`. Program 1 names a token (BY_TOKEN: any) or
    a sequence, skipped unless it has one query. HAS_SHARED: the first shared_tokens[s] tokens are
    done elsewhere. IS_QKV: q is qkv, whose k and v are written on the way."""
    GROUP: tl.constexpr = H // K
    wait_turn(OVERLAP)
    announce(OVERLAP)
    t, sequence, length, num_queries = row_of_program(
        query_starts, seq_lens, positions, token_sequences, BY_TOKEN
    )
    if num_queries != 1:
        return
    low, before = first_visible(length - 1, reach, VISIBLE), length * 0
    if HAS_SHARED:
        low = tl.maximum(low, tl.load(shared_tokens + sequence))
        before = tl.load(shared_partials + sequence)
    origin, size, count = splits_of(low, length, FIXED, BLOCK_N)
    kv_head, rows, offs_d = tl.program_id(0), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_head = rows < GROUP
    row_mask = is_head[:, None] & (offs_d < D)[None, :]
    heads = t * H + kv_head * GROUP + rows
    out_at = out + heads[:, None] * D + offs_d[None, :]
    if (count <= 0) & (before == 0) & (tl.program_id(2) == 0):
        zero = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
        tl.store(out_at, zero, mask=row_mask)
    begin, stop, num_busy = run_of_program(count)
    if tl.program_id(2) >= num_busy:
        return
    row = t if BY_TOKEN else sequence
    firsts = partials_of(row, partial_starts, num_partials, kv_head * GROUP + rows, H, PACKED)
    keys, values = both_planes(
        *(key, key_scale, stride_key, stride_key_scale),
        *(value, value_scale, stride_value, stride_value_scale, KEY, VALUE),
    )
    if IS_QKV:
        slot = tl.where(stop == count, tl.load(cache_slots + t), -1)
        q_tile = rope_of_kv_head(
            *(q + t * ((H + 2 * K) * D), kv_head, tl.maximum(length - 1, 0), slot, keys, values),
            *(cos, sin, query_weight, key_weight, eps),
            *(given_key, given_value, key_shift, key_factor),
            *(H, K, D, P, HALF, HAS_NORM, KEY, VALUE, HAS_GIVEN, HAS_SHIFT, HAS_FACTOR),
            *(BLOCK_M, BLOCK_D),
        )
    else:
        q_tile = tl.load(q + heads[:, None] * D + offs_d[None, :], mask=row_mask, other=0.0)
    table_row = block_table + sequence * stride_table
    keys, values = plane_of_head(keys, kv_head, D, KEY), plane_of_head(values, kv_head, D, VALUE)
    start = tl.maximum(origin + begin * size, low // BLOCK_N * BLOCK_N)
    end = tl.minimum(origin + stop * size, length)
    m, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + tl.arange(0, BLOCK_N)
        live = (n < end) & (n >= low)
        page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
        k = kv_tile(keys, page, n % P, live, q_tile.dtype, K * D, D, KEY, True, BLOCK_D)
        s = key_scores(q_tile, k, keys, page, n % P, live, K, KEY, True)
        if HAS_CAP:
            s = capped(s, scale_log2, cap_log2)
        s = tl.where(live[None, :], s, -float("inf"))
        p, m, total, acc = softmax_step(s, m, total, acc, scale_log2)
        v = kv_tile(values, page, n % P, live, q_tile.dtype, K * D, D, VALUE, True, BLOCK_D)
        acc = add_values(acc, p, v, values, page, n % P, live, K, VALUE, True)
        done = tile + BLOCK_N >= end
        if FIXED:
            done = done | (((tile + BLOCK_N) & (size - 1)) == 0)
        if done:
            store_split(
                *(acc / total[:, None], m + tl.log2(total), (count == 1) & (before == 0)),
                *(out_at, row_mask, partial_out, partial_lse),
                *(firsts + before + (tile - origin) // size, is_head),
                *(sinks + kv_head * GROUP + rows, D, HAS_SINKS),
            )
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


class DecodeShape(NamedTuple):
    """How the split kernel is launched."""

    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    """Of a thread, which the splits need; merging alone would take more."""
    num_programs: int
    """That an H100 runs at once, in one wave; those of a row share its splits."""


def decode_shape(
    head_size: int, dtype: torch.dtype, *, is_plain: bool = True, is_invariant: bool = False
) -> DecodeShape:
    """Returns the shape for products of `dtype` over keys and values that are plain numbers or not.
    Where splits are fixed, none is shorter than a tile."""
    if head_size > 128 or dtype == torch.float32:
        return DecodeShape(32, 4, 2, None, TARGET_PROGRAMS)
    if is_plain or is_invariant:
        return DecodeShape(64, 4, 2, 128, TARGET_PROGRAMS)
    # Unpacking wants registers, and large tiles for its fixed cost: three programs a processor.
    return DecodeShape(128, 4, 2, 168, TARGET_PROGRAMS * 3 // 4)


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
    unmixes: bool = False,
    shape: DecodeShape | None = None,
) -> bool:
    """Writes the rows of `out` [T, H, D] that belong to sequences with one query. With
    `is_invariant` a row has the same bits in every batch. Returns whether sums of values that are
    stored mixed are back in their own basis: where that is asked for (`unmixes`), if it could.

    `max_seq_len` bounds seq_lens_S. `is_qkv`: q is qkv [T, H + 2 K, D] before norm (of each head)
    and rotation, and its k and v are written too. With `token_sequences` (int32 [T], the sequence
    of each token) it writes every row, each as if decoded. `shared` (tokens, partials; int32 [S])
    tells how much of every sequence already lies in `partials`. `tickets`: see `make_tickets`.
    """
    rows = len(batch.seq_lens_S) if token_sequences is None else len(out)
    if rows == 0 or len(out) == 0:
        return False
    most = most_partials(op, max_seq_len)
    asked = SingleRows(
        q_THD=q_THD,
        op=op,
        layer=layer,
        batch=batch,
        out=out,
        partials=room_for(out, batch, rows, most) if partials is None else partials,
        most_partials=most,
        tickets=make_tickets(q_THD.device) if tickets is None else tickets,
        shared=shared,
        token_sequences=token_sequences,
    )
    may_share = token_sequences is None and not (is_qkv or is_invariant) and shape is None
    if may_share and lone.fits(q_THD, op, layer):
        unmixes = unmixes and stored_format(layer.value).is_mixed
        lone.lone_rows(asked, unmixes=unmixes)
        return unmixes
    _attend_splits(asked, shape, is_qkv=is_qkv, is_invariant=is_invariant)
    return False


def _attend_splits(
    asked: SingleRows, shape: DecodeShape | None, *, is_qkv: bool, is_invariant: bool
) -> None:
    """Launches the kernel above."""
    op, batch, out, q_THD = asked.op, asked.batch, asked.out, asked.q_THD
    planes, unused = planes_of(out, asked.layer, batch), batch.seq_lens_S
    _, num_heads, head_size = out.shape
    num_kv_heads, dtype = planes.num_heads, planes.dtype
    assert q_THD.is_contiguous()
    assert q_THD.shape[1] == num_heads + (2 * num_kv_heads if is_qkv else 0)
    assert asked.count * num_kv_heads <= len(asked.tickets), (asked.count, num_kv_heads)
    scores, quantizing = scores_of(op, unused), quantizing_of(op, planes, unused)
    shape = shape or decode_shape(
        head_size, dtype, is_plain=planes.is_plain, is_invariant=is_invariant
    )
    group, partials, by_token = num_heads // num_kv_heads, asked.partials, asked.token_sequences
    programs = max(1, shape.num_programs // (asked.count * num_kv_heads))
    # Heads are fastest: what they read of a page lies side by side in memory.
    _decode_kernel[(num_kv_heads, asked.count, min(asked.most_partials, programs))](
        out,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.positions_T,
        *(asked.shared or (unused, unused)),
        unused if partials.starts is None else partials.starts,
        partials.num_partials,
        asked.tickets,
        q_THD.to(dtype),
        *planes.arguments,
        unused if by_token is None else by_token,
        batch.block_table,
        batch.block_table.stride(0),
        *scores.arguments,
        batch.slot_mapping_T,
        *rotation_arguments(op, unused),
        *quantizing.arguments,
        H=num_heads,
        **planes.constants,
        IS_QKV=is_qkv,
        HALF=0 if op.rope is None or not is_qkv else op.rope.rotary_dim // 2,
        HAS_NORM=is_qkv and op.qk_norm is not None,
        **quantizing.constants,
        BY_TOKEN=by_token is not None,
        **scores.constants,
        HAS_SHARED=asked.shared is not None,
        PACKED=partials.starts is not None,
        FIXED=is_invariant,
        MERGE_M=next_power_of_2(group),
        MERGE_ROWS=MERGE_ROWS,
        BLOCK_M=max(16, next_power_of_2(group)),
        BLOCK_N=shape.block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **({} if shape.max_registers is None else {"maxnreg": shape.max_registers}),
        **launch_options(q_THD.device),
    )
