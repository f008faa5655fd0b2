"""Absorbed latent attention of single queries on Hopper: all heads of a token are rows of one tile.

Called by latent/decode.py where `fits` of tiles.py says so and no row is to be invariant. A row's
keys are shared out among programs that run at the same time; each waits for the others' partial
results, and merges its share of them: one kernel, whatever the length.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.hopper.pieces import ROWS
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.latent.hopper.tiles import (
    PRODUCER_REGISTERS,
    TILE,
    attend,
    described,
    load_queries,
    make_buffers,
    produce,
)
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.chip import cdiv, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options

UNSPECIALISED = ["num_partials", "stride_table"]
LOADED = gl.constexpr(16)
"""Partial results that a program loads at a time, of one head or more."""


@gluon.jit
def _produce(INDEX: gl.constexpr, pages, table_row, length, first_tile, tiles, rings):
    produce(pages, table_row, length, first_tile, tiles, 0, rings, INDEX)


@gluon.jit
def _merge(
    out, partial_out, partial_lse, heads, t, firsts, stride, count, begin, step,
    H: gl.constexpr, GROUP: gl.constexpr, RANK: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """out[t, heads + h] = sum_i w_i o_i / sum_i w_i, w_i = 2^lse_i, over the `count` partials of
    each head h < GROUP from firsts + h * stride on, HEADS at a time: `begin`, `begin + step` ..."""
    SLOTS: gl.constexpr = LOADED // HEADS
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 1, 32], [1, 1, 8], [2, 1, 0])
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    ends: gl.constexpr = gl.SliceLayout(1, layout)
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, pairs))[None, :]
    columns = gl.arange(0, RANK, gl.SliceLayout(0, ends))[None, :]
    for unit in range(begin, (GROUP + HEADS - 1) // HEADS, step):
        head = unit * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, pairs))[:, None]
        top = gl.full([HEADS, SLOTS], -float("inf"), gl.float32, pairs)
        total = gl.zeros([HEADS, SLOTS], gl.float32, pairs)
        acc = gl.zeros([HEADS, SLOTS, RANK], gl.float32, layout)
        for start in range(0, count, SLOTS):
            at = firsts + head * stride + (start + slots)
            live = (start + slots < count) & (head < GROUP)
            lse = gl.load(partial_lse + at, mask=live, other=-float("inf"), cache_modifier=".cg")
            there = partial_out + at[:, :, None] * RANK + columns[:, None, :]
            x = gl.load(there, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
            higher = gl.maximum(top, lse)
            floor = gl.where(higher == -float("inf"), 0.0, higher)
            w, shrink = gl.exp2(lse - floor), gl.exp2(top - floor)
            acc = acc * shrink[:, :, None] + x * w[:, :, None]
            total = total * shrink + w
            top = higher
        highest = gl.max(top, 1)
        w = gl.exp2(top - gl.where(highest == -float("inf"), 0.0, highest)[:, None])
        whole = gl.convert_layout(gl.sum(total * w, 1), gl.SliceLayout(1, ends))
        mean = gl.sum(acc * w[:, :, None], 1) / gl.where(whole > 0, whole, 1.0)[:, None]
        mine = unit * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, ends))
        to = out + (t * H + heads + mine)[:, None] * RANK + columns
        gl.store(to, mean.to(out.dtype.element_ty), mask=(mine < GROUP)[:, None])


@gluon.jit
def _consume(
    H: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, PACKED: gl.constexpr,
    HEADS: gl.constexpr, q, out, partial_out, partial_lse, partial_starts, num_partials, ticket,
    scale_log2, buffers, place, work, rings,
):  # fmt: skip
    """Attends this program's share, and merges its part of the row's results."""
    q_rank, q_rotated, weights = buffers
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    N: gl.constexpr = weights.shape[1]
    t, sequence, heads, split, num_busy, before = place
    low, length, end, first_tile, tiles = work
    wide: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
    narrow: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
    s_rows: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    first = sequence * num_partials
    stride = num_partials.to(gl.int64)
    if PACKED:
        first = gl.load(partial_starts + sequence).to(gl.int64)
        stride = gl.load(partial_starts + sequence + 1) - first
    firsts = first * H + heads * stride
    row = t * H + heads
    head = gl.arange(0, M, acc_rows)
    columns = gl.arange(0, RANK, gl.SliceLayout(0, acc_layout))[None, :]
    whole = out + (row + head)[:, None] * RANK + columns
    is_alone = (num_busy == 1) & (before == 0)
    if tiles > 0:
        at = gl.arange(0, M, wide)
        also = gl.arange(0, M, narrow)
        load_queries(q, row + at, at < GROUP, row + also, also < GROUP, q_rank, q_rotated)
        position = end - 1 + gl.zeros([M], gl.int32, s_rows)
        mean, lse = attend(
            buffers, low, position, first_tile, tiles, tiles * 0, length, scale_log2, rings, P
        )
        live = head < GROUP
        gl.store(whole, mean.to(out.dtype.element_ty), (live & is_alone)[:, None])
        to = firsts + head * stride + before + split
        is_partial = live & (num_busy + before > 1)
        gl.store(partial_out + to[:, None] * RANK + columns, mean, is_partial[:, None])
        gl.store(partial_lse + to, lse, is_partial)
    # Where there was nothing to see, a merge of nothing stores zeros.
    if ((num_busy + before > 1) | (tiles == 0)) & (split < num_busy):
        if num_busy > 1:
            gl.thread_barrier()  # All threads have stored before one of them tells so.
            arrived = gl.atomic_add(ticket, 1, sem="acq_rel") + 1
            while arrived % 65536 < num_busy:
                arrived = gl.atomic_add(ticket, 0, sem="acquire")
            gl.thread_barrier()
        count = before + num_busy
        if tiles == 0:
            count = before
        _merge(
            out, partial_out, partial_lse, heads, t, firsts, stride, count, split, num_busy, H,
            GROUP, RANK, HEADS,
        )  # fmt: skip
        if num_busy > 1:
            left = gl.atomic_add(ticket, 65536, sem="relaxed") // 65536 + 1
            if left == num_busy:
                gl.store(ticket, 0)


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def _lone_latents_kernel(
    q,
    pages,
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    shared_tokens,
    shared_partials,
    partial_starts,
    num_partials,
    tickets,
    block_table,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    RANK: gl.constexpr,
    HAS_SHARED: gl.constexpr,
    PACKED: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """GROUP heads (`program 0`) of a sequence (1) with one query, a share (2) of its keys.

    out [T, H, RANK] = softmax(scale q (c, r)^T) c over [low, length); q [T, H, RANK + 64], pages
    [B, P, RANK + 64]. Partial results, PACKED and HAS_SHARED as in attention/decode.py, but that a
    share leaves one. Programs of a row must be able to run at the same time.
    """
    buffers, rings = make_buffers(pages.dtype, ROWS, RANK, BLOCK_N)
    if OVERLAP:  # The other warps begin at warp_specialize, thus after it.
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    sequence = gl.program_id(1).to(gl.int64)
    t = gl.load(query_starts + sequence).to(gl.int64)
    num_queries = gl.load(query_starts + sequence + 1) - t
    length = gl.load(seq_lens + sequence)
    low = length * 0
    before = length * 0
    if HAS_SHARED:
        low = gl.load(shared_tokens + sequence)
        before = gl.load(shared_partials + sequence)
    split = gl.program_id(2)
    origin = low // BLOCK_N
    all_tiles = gl.maximum(gl.cdiv(length, BLOCK_N) - origin, 0)
    all_tiles = gl.where(length > low, all_tiles, 0)
    # No more partial results than SPLIT_CLASSES has splits.
    least = gl.where(length - low <= 16384, 256 // BLOCK_N, 512 // BLOCK_N)
    least = gl.where(length - low <= 4096, 128 // BLOCK_N, least)
    least = gl.where(length - low <= 1024, 1, least)
    share = gl.maximum(gl.cdiv(all_tiles, gl.num_programs(2)), least)
    num_busy = gl.maximum(gl.cdiv(all_tiles, share), 1)
    tiles = gl.maximum(gl.minimum(share, all_tiles - split * share), 0)
    first_tile = origin + split * share
    end = gl.minimum((first_tile + tiles) * BLOCK_N, length)
    if num_queries != 1:
        tiles = tiles * 0
        before = before * 0
        num_busy = num_busy * 0
    heads = gl.program_id(0) * GROUP
    ticket = tickets + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    P: gl.constexpr = pages.block_shape[1]
    place = (t, sequence, heads, split, num_busy, before)
    work = (low, length, end, first_tile, tiles)
    table_row = block_table + sequence * stride_table
    result = (q, out, partial_out, partial_lse, partial_starts, num_partials, ticket, scale_log2,
              buffers, place, work, rings)  # fmt: skip
    source = (pages, table_row, length, first_tile, tiles, rings)
    gl.warp_specialize(
        [  # Numbers that variables hold would no longer be constants.
            (_consume, (H, GROUP, P, PACKED, HEADS) + result),  # noqa: RUF005
            (_produce, (0,) + source),  # noqa: RUF005
            (_produce, (1,) + source),  # noqa: RUF005
            (_produce, (2,) + source),  # noqa: RUF005
            (_produce, (3,) + source),  # noqa: RUF005
        ],
        [1, 1, 1, 1],
        [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
    )


def lone_latents(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    out_THR: Tensor,
    partials: Partials,
    tickets: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    most_shares: int,
) -> None:
    """Writes the rows of `out` that belong to sequences with one query: see `latent_decode`.
    `most_shares`: partial results that a row has room for."""
    num_heads, unused = q_THC.shape[1], batch.seq_lens_S
    rows = len(batch.seq_lens_S)
    groups = cdiv(num_heads, ROWS.value)
    while num_heads % groups:
        groups += 1
    assert rows * groups <= len(tickets), (rows, groups)
    programs = min(most_shares, max(1, num_processors(q_THC.device) // (rows * groups)))
    _lone_latents_kernel[(groups, rows, programs)](
        q_THC,
        described(plane),
        *(out_THR, partials.out, partials.lse),
        *(batch.query_starts, batch.seq_lens_S, *(shared or (unused, unused))),
        unused if partials.starts is None else partials.starts,
        partials.num_partials,
        tickets,
        batch.block_table,
        batch.block_table.stride(0),
        scale * LOG2_E,
        H=num_heads,
        GROUP=num_heads // groups,
        RANK=plane.rank,
        HAS_SHARED=shared is not None,
        PACKED=partials.starts is not None,
        HEADS=2 if shared is not None or programs <= 8 else 1,
        BLOCK_N=TILE,
        REGISTERS=PRODUCER_REGISTERS,
        num_warps=8,
        **launch_options(q_THC.device),
    )
