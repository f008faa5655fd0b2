"""Causal attention on Hopper: pages come by TMA, products run beside the softmax.

Called where `fits` says so for chunks (attention.py) and for prefixes that decoding sequences share
(shared.py). Never takes windows, chunks, soft caps or 32-bit numbers, and never asks the device
anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.device_plan import SharedPrefix
from octavo.kernels.triton.attention.hopper.pieces import LONG, ROWS, SHARED, SHORT, piece, rows_of
from octavo.kernels.triton.attention.hopper.tiles import attend, load_tile, pages_of, pass_by
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.scores import scores_of
from octavo.kernels.triton.attention.short_chunks import ShortPlan
from octavo.kernels.triton.attention.splits import TILE_ROWS, tiling
from octavo.kernels.triton.launching.chip import cdiv, has_wgmma, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.visibility import Full

LOG2_E = gl.constexpr(1.4426950408889634)
FEW_TOKENS = 128
"""Of short chunks: up to here they wait for keys."""
HALF = 64
"""Columns of the 128-byte rows that TMA swizzles and that wgmma reads."""
PAGE_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)
UNSPECIALISED = ["num_owners", "num_tiles", "num_partials", "stride_table"]
"""Arguments that change from step to step: one binary for all."""
assert 2 * ROWS.value == TILE_ROWS  # Plans count its tiles.


@gluon.jit
def _produce(
    H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr, MOST: gl.constexpr,
    GROUP: gl.constexpr,
    key, value, block_table, stride_table, turns, plan, rings,
):  # fmt: skip
    """Keeps the rings of keys and values full."""
    k, v, k_full, k_empty, v_full, v_empty = rings
    D: gl.constexpr = k.shape[2]
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    base = turns * 0
    for turn in range(turns):
        heads, _, sequence, _, _, _, first_tile, tiles, length, _, _ = piece(
            turn, plan, N, H, STACK, FORM, MOST, 2 * ROWS
        )
        table_row = block_table + sequence.to(gl.int64) * stride_table
        column = heads * STACK // GROUP * D
        for tile in range(tiles):
            stage = (base + tile) % S
            phase = (base + tile) // S & 1 ^ 1
            pages = pages_of(table_row, first_tile + tile, length, N, key.block_shape[1])
            mbarrier.wait(k_empty.index(stage), phase)
            load_tile(pages, key, column, k, stage, k_full)
            mbarrier.wait(v_empty.index(stage), phase)
            load_tile(pages, value, column, v, stage, v_full)
        base += tiles


@gluon.jit
def _consume(
    H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr, MOST: gl.constexpr,
    INDEX: gl.constexpr, P: gl.constexpr, HAS_SINKS: gl.constexpr,
    q, out, partial_out, partial_lse, num_partials, scale_log2, sinks, q_ring, turns, plan, rings,
):  # fmt: skip
    """Attends half of each piece's queries: the INDEX-th so many rows."""
    M: gl.constexpr = q_ring.shape[1]
    D: gl.constexpr = q_ring.shape[2]
    N: gl.constexpr = rings[0].shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    wide_rows: gl.constexpr = gl.SliceLayout(1, wide)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    base = turns * 0
    for turn in range(turns):
        heads, split, _, row, count, first, first_tile, tiles, length, parts, base_partial = piece(
            turn, plan, N, H, STACK, FORM, MOST, 2 * ROWS
        )
        first = first + INDEX * (M // STACK)
        if (tiles > 0) & (first >= count):
            pass_by(rings, base, tiles)
        if (tiles > 0) & (first < count):
            at, live = rows_of(plan, heads, row, first, count, H, STACK, FORM, M, wide_rows)
            x = gl.load(q + at[:, None] * D + offs_d, mask=live[:, None], other=0.0)
            gl.thread_barrier()
            q_ring.index(INDEX).store(x)
            fence_async_shared()
            gl.thread_barrier()
            if FORM == SHARED:
                seen = length
                position = length - 1 + gl.zeros([M], gl.int32, s_rows)
            else:
                seen = length - count + first + 1
                query = first + gl.arange(0, M, s_rows) // STACK
                position = length - count + gl.minimum(query, count - 1)
            mean, lse = attend(
                q_ring.index(INDEX), rings, base, position, seen, first_tile, tiles, length,
                scale_log2, P,
            )  # fmt: skip
            whole = mean
            if HAS_SINKS:
                head = heads * STACK + gl.arange(0, M, acc_rows) % STACK
                sink_log2 = gl.load(sinks + head) * LOG2_E
                whole = mean * (1.0 / (1.0 + gl.exp2(sink_log2 - lse)))[:, None]
            if FORM != LONG:
                place, live = rows_of(
                    plan, heads, row, first, count, H, STACK, FORM, M, acc_rows, True
                )
                if FORM == SHORT:
                    live = live & (parts > 1)
                    place = (place - row.to(gl.int64) * H) * parts + base_partial * H + split
                else:
                    place = place * num_partials + split
                to = partial_out + place[:, None] * D
                to += gl.arange(0, D, gl.SliceLayout(0, acc_layout))[None, :]
                gl.store(to, mean, mask=live[:, None])
                gl.store(partial_lse + place, lse, mask=live)
            if FORM != SHARED:
                at, live = rows_of(plan, heads, row, first, count, H, STACK, FORM, M, wide_rows)
                if FORM == SHORT:
                    live = live & (parts < 2)
                whole = gl.convert_layout(whole.to(q_ring.dtype), wide)
                gl.store(out + at[:, None] * D + offs_d, whole, mask=live[:, None])
        base += tiles


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def _hopper_kernel(
    q,
    key,
    value,
    out,
    partial_out,
    partial_lse,
    starts,
    lengths,
    members,
    query_starts,
    sizes,
    piece_starts,
    block_table,
    num_owners,
    num_tiles,
    num_partials,
    stride_table,
    scale_log2,
    sinks,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    STACK: gl.constexpr,
    D: gl.constexpr,
    FORM: gl.constexpr,
    MOST: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """softmax(scale q k^T + causal mask) v by pieces of 2 * ROWS rows: STACK heads of a kv head for
    each query, and one split of the keys.

    q, out [T, H, D]; key, value [B, P, K * D]. Owner o of queries has those of rows starts[o] to
    starts[o + 1], and pieces (heads not counted) piece_starts[o] to piece_starts[o + 1]; of LONG,
    tiles among num_tiles as in _prefill_kernel. One warp loads; two warpgroups attend ROWS rows
    each.
    LONG: sequences with more than MOST queries, to `out`.
    SHORT: those that a plan gives pieces; sizes and piece_starts are its `ShortPlan.table`. Splits
    go to partial_out, unless there is one: that is `out`.
    SHARED: owners are groups, queries their members' (query_starts[members[i]]), keys the first
    lengths[members[starts[o]]], all visible, in splits of sizes[o], to partial_out [S, H,
    num_partials, D].
    """
    P: gl.constexpr = key.block_shape[1]
    dtype: gl.constexpr = key.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    if OVERLAP:  # The other warps begin at warp_specialize, thus after it.
        gdc_wait()
    if FORM == LONG:
        pieces = H // STACK * num_tiles
    else:
        pieces = H // STACK * gl.load(piece_starts + num_owners)
    plan = (starts, lengths, members, query_starts, sizes, piece_starts, num_owners, num_tiles,
            pieces)  # fmt: skip
    rings = (k, v, k_full, k_empty, v_full, v_empty)
    turns = gl.cdiv(pieces, gl.num_programs(0))
    result = (q, out, partial_out, partial_lse, num_partials, scale_log2, sinks, q_ring, turns,
              plan, rings)  # fmt: skip
    source = (key, value, block_table, stride_table, turns, plan, rings)
    gl.warp_specialize(
        [  # Numbers that variables hold would no longer be constants.
            (_consume, (H, STACK, FORM, MOST, 0, P, HAS_SINKS) + result),
            (_consume, (H, STACK, FORM, MOST, 1, P, HAS_SINKS) + result),
            (_produce, (H, STACK, FORM, MOST, GROUP) + source),
        ],
        [4, 1],
        [232, 40],
    )


def fits(q_THD: Tensor, op: AttentionOp, layer: KVLayer) -> bool:
    """Whether the functions below can take a layer; never depends on the step, so that a row's
    bits do not."""
    pages = (layer.key, layer.value)
    return (
        op.visibility == Full()
        and op.soft_cap is None
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == q_THD.dtype and x.data_ptr() % 16 == 0 for x in (q_THD, *pages))
        and q_THD.shape[2] in (64, 128)
        and layer.key.shape[1] in (16, 32, 64, 128)
        and has_wgmma(q_THD.device)
    )


class _Work(NamedTuple):
    """Who has how many queries, and how the work on them is cut: see `_hopper_kernel`."""

    starts: Tensor
    lengths: Tensor
    num_queries: int
    most_splits: int = 1
    members: Tensor | None = None
    sizes: Tensor | None = None
    piece_starts: Tensor | None = None


def long_chunks(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    short: int,
) -> None:
    """Writes the rows of `out` [T, H, D] whose sequences have more than `short` queries."""
    work = _Work(batch.query_starts, batch.seq_lens_S, len(q_THD))
    _launch(LONG, q_THD, op, layer, batch, out, work, None, short=short)


def short_chunks(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    partials: Partials,
    plan: ShortPlan,
    num_tokens: int,
) -> None:
    """Attends the chunks of a plan, all among the first `num_tokens`: to `out` what is in one
    split, else to `partials`."""
    work = _Work(
        batch.query_starts,
        batch.seq_lens_S,
        num_tokens,
        plan.limits.splits,
        sizes=plan.table,
        piece_starts=plan.table,
    )
    _launch(SHORT, q_THD, op, layer, batch, out, work, partials)


def shared_prefixes(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    plan: SharedPrefix,
    partials: Partials,
) -> None:
    """Writes to `partials` [S, H, partials] what the members of groups see of the shared tokens."""
    work = _Work(
        plan.group_starts,
        plan.shared_tokens_S,
        len(plan.members),
        plan.max_splits,
        plan.members,
        plan.split_sizes,
        plan.piece_starts,
    )
    _launch(SHARED, q_THD, op, layer, batch, q_THD, work, partials)


def _ring(form: gl.constexpr, num_tokens: int, block_size: int) -> tuple[int, int]:
    """Returns how many keys a tile has, and how many tiles are on their way: the best on an H100
    (benchmarks/kernels/splits.py). Shared prefixes leave room for one more."""
    if form is SHORT and num_tokens <= FEW_TOKENS and block_size <= HALF:
        return 64, 4
    return 128, 3 if form is SHARED else 2


def _launch(
    form: gl.constexpr,
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    work: _Work,
    partials: Partials | None,
    *,
    short: int = 0,
) -> None:
    planes_of(q_THD, layer, batch)
    num_heads, head_size = q_THD.shape[1:]
    block_size, num_kv_heads = layer.key.shape[1:3]
    tiles = tiling(num_heads, num_kv_heads, num_processors(q_THD.device))
    num_owners = len(work.starts) - 1
    scores = scores_of(op, work.starts)
    num_tiles = cdiv(work.num_queries, tiles.queries) + num_owners - 1
    most_pieces = tiles.head_groups * num_tiles * work.most_splits
    block_n, stages = _ring(form, work.num_queries, block_size)
    page = [1, block_size, HALF]
    _hopper_kernel[(min(most_pieces, tiles.processors),)](
        q_THD,
        TensorDescriptor.from_tensor(layer.key.flatten(2), page, PAGE_LAYOUT),
        TensorDescriptor.from_tensor(layer.value.flatten(2), page, PAGE_LAYOUT),
        out,
        q_THD if partials is None else partials.out,
        q_THD if partials is None else partials.lse,
        work.starts,
        work.lengths,
        work.starts if work.members is None else work.members,
        batch.query_starts,
        work.starts if work.sizes is None else work.sizes,
        work.starts if work.piece_starts is None else work.piece_starts,
        batch.block_table,
        num_owners,
        num_tiles,
        0 if partials is None else partials.num_partials,
        batch.block_table.stride(0),
        *(scores.scale_log2, scores.sinks),
        H=num_heads,
        GROUP=num_heads // num_kv_heads,
        STACK=tiles.stack,
        D=head_size,
        FORM=form.value,
        MOST=short,
        HAS_SINKS=scores.has_sinks and form is not SHARED,
        BLOCK_N=block_n,
        STAGES=stages,
        num_warps=4,
        **launch_options(q_THD.device),
    )
