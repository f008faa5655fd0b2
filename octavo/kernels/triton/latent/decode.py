"""Latent attention of single queries in absorbed form: all heads read one latent vector a token.

Queries are multiplied by the key's up-projection before, results by the value's after (DeepSeek-V2,
arXiv 2405.04434, section 2.1). Splits, partial results and their merge are those of
attention/decode.py; a page is read once for the scores and the sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.facts import LONE_PROGRAMS, lone_partials, split_partials
from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.decode import MERGE_ROWS
from octavo.kernels.triton.attention.partials import (
    Partials,
    make_partials,
    merge_kv_head,
    partials_of,
)
from octavo.kernels.triton.attention.rows import (
    row_of_program,
    run_of_program,
    splits_of,
    store_split,
)
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.latent.hopper.few_heads import few_head_latents, is_for
from octavo.kernels.triton.latent.hopper.lone import lone_latents
from octavo.kernels.triton.latent.hopper.rows import LoneRows
from octavo.kernels.triton.latent.hopper.tiles import fits
from octavo.kernels.triton.latent.pages import LatentPlane, latent_scores, latent_tile
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last, make_tickets
from octavo.kernels.triton.tiles.kv import add_values
from octavo.kernels.triton.tiles.softmax import softmax_step

MOST_HEADS = 16
"""Of one program: more would leave the sums of a program no registers."""


@launchable
@triton.jit(do_not_specialize=["num_partials"])
def _latent_decode_kernel(
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    positions,
    shared_tokens,
    shared_partials,
    num_partials,
    tickets,
    q,
    pages,
    scales,
    stride_block,
    stride_scales,
    token_sequences,
    block_table,
    stride_table,
    scale_log2,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    FIXED: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """H // GROUPS heads (`program 0`) of one token, a run of splits by `program 2`.

    out [T, H, RANK] = softmax(scale q (c, r)^T) c over [low, len), c the first RANK columns of a
    token's page row, r the next ROPE; q [T, H, RANK + ROPE]. Partial results, FIXED, BY_TOKEN and
    HAS_SHARED as in attention/decode.py.
    """
    GROUP: tl.constexpr = H // GROUPS
    wait_turn(OVERLAP)
    announce(OVERLAP)
    t, sequence, length, num_queries = row_of_program(
        query_starts, seq_lens, positions, token_sequences, BY_TOKEN
    )
    if num_queries != 1:
        return
    low = length * 0
    before = length * 0
    if HAS_SHARED:
        low = tl.load(shared_tokens + sequence)
        before = tl.load(shared_partials + sequence)
    origin, size, count = splits_of(low, length, FIXED, BLOCK_N)
    group = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    is_head = rows < GROUP
    row_mask = is_head[:, None] & (offs_r < RANK)[None, :]
    heads = t * H + group * GROUP + rows
    out_at = out + heads[:, None] * RANK + offs_r[None, :]
    if (count <= 0) & (before == 0) & (tl.program_id(2) == 0):
        tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_R], out.dtype.element_ty), mask=row_mask)
    begin, stop, num_busy = run_of_program(count)
    if tl.program_id(2) >= num_busy:
        return
    row = t if BY_TOKEN else sequence
    firsts = partials_of(row, tickets, num_partials, group * GROUP + rows, H, False)
    q_at = q + heads[:, None] * (RANK + ROPE)
    q_rank = tl.load(q_at + offs_r[None, :], mask=row_mask, other=0.0)
    mask_e = is_head[:, None] & (offs_e < ROPE)[None, :]
    q_rope = tl.load(q_at + RANK + offs_e[None, :], mask=mask_e, other=0.0)
    table_row = block_table + sequence * stride_table
    plane = (pages, scales, stride_block, stride_scales, 0)
    start = tl.maximum(origin + begin * size, low // BLOCK_N * BLOCK_N)
    end = tl.minimum(origin + stop * size, length)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for tile in tl.range(start, end, BLOCK_N):
        n = tile + tl.arange(0, BLOCK_N)
        live = (n < end) & (n >= low)
        page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
        c, r = latent_tile(
            plane, page, n % P, live, q_rank.dtype, RANK, ROPE, FORMAT, BLOCK_R, BLOCK_E
        )
        s = latent_scores(q_rank, q_rope, c, r, plane, page, n % P, live, FORMAT)
        s = tl.where(live[None, :], s, -float("inf"))
        p, m, total, acc = softmax_step(s, m, total, acc, scale_log2)
        acc = add_values(acc, p, c, plane, page, n % P, live, 2, FORMAT, True)
        done = tile + BLOCK_N >= end
        if FIXED:
            done = done | (((tile + BLOCK_N) & (size - 1)) == 0)
        if done:
            store_split(
                *(acc / total[:, None], m + tl.log2(total), (count == 1) & (before == 0)),
                *(out_at, row_mask, partial_out, partial_lse),
                *(firsts + before + (tile - origin) // size, is_head),
                *(tickets, RANK, False),
            )
        m = tl.where(done, -float("inf"), m)
        total = tl.where(done, 0.0, total)
        acc = tl.where(done, 0.0, acc)
    if (count < 2) & (before == 0):
        return
    if is_last(tickets + tl.program_id(1) * GROUPS + group, num_busy):
        merge_kv_head(
            *(out, partial_out, partial_lse, row, t, group, tickets, num_partials),
            *(before + count, tickets, H, GROUPS, RANK, False, False),
            *(MERGE_M, MERGE_ROWS, BLOCK_R),
        )


def latent_decode_shape(dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns (BLOCK_N, num_warps, num_stages) of the split kernel."""
    return (16, 4, 1) if dtype == torch.float32 else (64, 8, 2)


def latent_decode(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    out_THR: Tensor,
    *,
    max_seq_len: int,
    token_sequences: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    partials: Partials | None = None,
    tickets: Tensor | None = None,
    is_invariant: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> None:
    """Writes the rows of `out` [T, H, rank] that belong to sequences with one query: the weighted
    sums of their latent vectors.

    q [T, H, C] are absorbed queries, then rotated ones, C = rank + rotated columns, in the basis of
    what the plane keeps. All else as `decode_attention` takes it.
    """
    num_tokens, num_heads, columns = q_THC.shape
    assert q_THC.is_contiguous()
    assert out_THR.shape == (num_tokens, num_heads, plane.rank)
    assert columns == plane.rank + plane.rope_size, (columns, plane.rank, plane.rope_size)
    num_rows = len(batch.seq_lens_S) if token_sequences is None else num_tokens
    if num_rows == 0 or num_tokens == 0:
        return
    most = split_partials(max_seq_len) if is_invariant else lone_partials(num_rows, max_seq_len)
    if partials is None:
        partials = make_partials(out_THR, most, None, num_rows * most)
    rows = LoneRows(
        q_THC=q_THC,
        plane=plane,
        batch=batch,
        scale=scale,
        out_THR=out_THR,
        partials=partials,
        tickets=make_tickets(q_THC.device) if tickets is None else tickets,
        shared=shared,
        most_shares=most,
    )
    if token_sequences is None and not is_invariant and shape is None and fits(q_THC, plane):
        _hopper_kernel(rows)(rows)
    else:
        _portable(rows, num_rows, token_sequences, is_invariant=is_invariant, shape=shape)


def _hopper_kernel(rows: LoneRows) -> Callable[[LoneRows], None]:
    is_few = is_for(rows.num_rows, rows.num_heads, rows.processors)
    return few_head_latents if is_few else lone_latents


def _portable(
    rows: LoneRows,
    num_rows: int,
    token_sequences: Tensor | None,
    *,
    is_invariant: bool,
    shape: tuple[int, int, int] | None,
) -> None:
    """Launches the kernel of this file over `num_rows` sequences, or tokens of
    `token_sequences`."""
    q_THC, plane, batch, partials = rows.q_THC, rows.plane, rows.batch, rows.partials
    dtype, unused = plane.dtype_with(q_THC), batch.seq_lens_S
    groups = -(-rows.num_heads // MOST_HEADS)
    while rows.num_heads % groups:
        groups += 1
    group = rows.num_heads // groups
    assert num_rows * groups <= len(rows.tickets), (num_rows, groups)
    block_n, num_warps, num_stages = shape or latent_decode_shape(dtype)
    programs = min(rows.most_shares, max(1, LONE_PROGRAMS // (num_rows * groups)))
    _latent_decode_kernel[(groups, num_rows, programs)](
        rows.out_THR,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.positions_T,
        *(rows.shared or (unused, unused)),
        partials.num_partials,
        rows.tickets,
        q_THC.to(dtype),
        *plane.arguments,
        unused if token_sequences is None else token_sequences,
        batch.block_table,
        batch.block_table.stride(0),
        rows.scale * LOG2_E,
        H=rows.num_heads,
        GROUPS=groups,
        **plane.constants,
        BY_TOKEN=token_sequences is not None,
        HAS_SHARED=rows.shared is not None,
        FIXED=is_invariant,
        MERGE_M=next_power_of_2(group),
        MERGE_ROWS=MERGE_ROWS,
        BLOCK_M=max(16, next_power_of_2(group)),
        BLOCK_N=block_n,
        BLOCK_R=max(16, next_power_of_2(plane.rank)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THC.device),
    )
