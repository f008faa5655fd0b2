"""Absorbed latent attention of single queries on Hopper: all heads of a token are rows of one tile.

Called by latent/decode.py where `fits` of tiles.py says so and no row is to be invariant. A row's
keys are shared out among programs that run at the same time (attention/hopper/shares.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton.attention.hopper.pieces import ROWS
from octavo.kernels.triton.attention.hopper.shares import merge_shares
from octavo.kernels.triton.latent.hopper.rows import UNSPECIALISED, LoneRows, own_share
from octavo.kernels.triton.latent.hopper.tiles import (
    PRODUCER_REGISTERS,
    attend,
    load_queries,
    make_buffers,
    produce,
)
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options


@gluon.jit
def _produce(INDEX: gl.constexpr, pages, table_row, length, first_tile, tiles, rings):
    produce(pages, table_row, length, first_tile, tiles, 0, rings, INDEX)


@gluon.jit
def _consume(
    H: gl.constexpr, GROUP: gl.constexpr, P: gl.constexpr, HEADS: gl.constexpr, q, out, partial_out,
    partial_lse, firsts, num_partials, ticket, scale_log2, buffers, place, work, rings,
):  # fmt: skip
    """Attends this program's share, and merges its part of the row's results."""
    q_rank, q_rotated, weights = buffers
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    N: gl.constexpr = weights.shape[1]
    t, _, heads, split, num_busy, before = place
    low, length, end, first_tile, tiles = work
    wide: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
    narrow: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
    s_rows: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    stride = num_partials.to(gl.int64)
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
    merge_shares(
        out, partial_out, partial_lse, place, tiles, firsts, stride, ticket, H, GROUP, RANK, HEADS
    )


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
    num_partials,
    tickets,
    block_table,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    RANK: gl.constexpr,
    HAS_SHARED: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """GROUP heads (`program 0`) of a sequence (1) with one query, a share (2) of its keys.

    out [T, H, RANK] = softmax(scale q (c, r)^T) c over [low, length); q [T, H, RANK + 64], pages
    [B, P, RANK + 64]. Partial results and HAS_SHARED as in attention/decode.py, but that a share
    leaves one. Programs of a row must be able to run at the same time.
    """
    buffers, rings = make_buffers(pages.dtype, ROWS, RANK, BLOCK_N)
    if OVERLAP:  # The other warps begin at warp_specialize, thus after it.
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    place, work, firsts, ticket, table_row = own_share(
        query_starts, seq_lens, shared_tokens, shared_partials, num_partials, tickets, block_table,
        stride_table, H, GROUP, HAS_SHARED, BLOCK_N,
    )  # fmt: skip
    _, length, _, first_tile, tiles = work
    P: gl.constexpr = pages.block_shape[1]
    result = (q, out, partial_out, partial_lse, firsts, num_partials, ticket, scale_log2,
              buffers, place, work, rings)  # fmt: skip
    source = (pages, table_row, length, first_tile, tiles, rings)
    gl.warp_specialize(
        [  # Numbers that variables hold would no longer be constants.
            (_consume, (H, GROUP, P, HEADS) + result),
            (_produce, (0,) + source),
            (_produce, (1,) + source),
            (_produce, (2,) + source),
            (_produce, (3,) + source),
        ],
        [1, 1, 1, 1],
        [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
    )


def lone_latents(rows: LoneRows) -> None:
    """Writes the rows of `out` that belong to sequences with one query: see `latent_decode`."""
    groups = cdiv(rows.num_heads, ROWS.value)
    while rows.num_heads % groups:
        groups += 1
    grid = rows.grid(groups)
    _lone_latents_kernel[grid](
        *rows.arguments,
        **rows.constants,
        GROUP=rows.num_heads // groups,
        HEADS=2 if rows.shared is not None or grid[2] <= 8 else 1,
        REGISTERS=PRODUCER_REGISTERS,
        num_warps=8,
        **launch_options(rows.q_THC.device),
    )
