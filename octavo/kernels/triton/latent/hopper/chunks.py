"""Absorbed latent attention of many rows on Hopper: short chunks, and prefixes that decodes share.

Called by choose.py and shared.py where `fits` of tiles.py says so. Pieces of work are those of
attention/hopper; a program takes one of ROWS rows, as a latent vector's sums leave no room for
more. Never takes formats with scales.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.device_plan import SharedPrefix
from octavo.kernels.triton.attention.hopper.pieces import ROWS, SHARED, SHORT, piece, rows_of
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.attention.short_chunks import ShortPlan
from octavo.kernels.triton.attention.splits import LATENT_ROWS, Tiling
from octavo.kernels.triton.latent.hopper.seesaw import (
    attend_half,
    hear,
    load_queries,
    make_buffers,
    produce_pairs,
    tell,
)
from octavo.kernels.triton.latent.hopper.tiles import (
    PRODUCER_REGISTERS,
    TILE,
    described,
)
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options

assert ROWS.value == LATENT_ROWS  # Plans count its pieces.
CONSUMER_REGISTERS = 232
"""Of a thread that attends: what two warpgroups and four warps can have."""
MOST_TOTAL, MOST_TOTAL_FLOAT16 = gl.constexpr(2.0**100), gl.constexpr(2.0**15)
"""Of a row's weights, whose numbers have so much room above 1."""
UNSPECIALISED = ["num_owners", "num_partials", "stride_table"]


@gluon.jit
def _produce(
    INDEX: gl.constexpr, H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr, pages,
    block_table, stride_table, turns, plan, told, rings,
):  # fmt: skip
    """Keeps a share of the ring of tiles full."""
    N: gl.constexpr = rings[0].shape[1]
    again = told[2]
    judged = told[5]
    before = turns * 0
    runs = turns * 0
    for turn in range(turns):
        _, _, sequence, _, _, _, first_tile, tiles, length, _, _ = piece(
            turn, plan, N, H, STACK, FORM, 0, ROWS
        )
        table_row = block_table + sequence.to(gl.int64) * stride_table
        pairs = (tiles + 1) // 2
        left = gl.minimum(tiles, 1)
        while left > 0:
            produce_pairs(pages, table_row, length, first_tile, pairs, before, rings, INDEX)
            left = hear(again, judged, runs & 1)
            before += pairs
            runs += 1


@gluon.jit
def _attend(
    WHICH: gl.constexpr, H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr, P: gl.constexpr,
    q, out, partial_out, partial_lse, num_partials, scale_log2, buffers, turns, plan, told, rings,
):  # fmt: skip
    """Attends the pieces, with the other warpgroup: half WHICH of the columns of their results."""
    queries = buffers[0]
    M: gl.constexpr = queries.shape[1]
    HALF: gl.constexpr = queries.shape[2]
    RANK: gl.constexpr = 2 * HALF
    N: gl.constexpr = rings[0].shape[1]
    MOST: gl.constexpr = MOST_TOTAL if queries.dtype == gl.bfloat16 else MOST_TOTAL_FLOAT16
    wide: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
    narrow: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    s_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    before = turns * 0
    pieces = turns * 0
    runs = turns * 0
    for turn in range(turns):
        heads, split, _, row, count, first, first_tile, tiles, length, parts, base_partial = piece(
            turn, plan, N, H, STACK, FORM, 0, ROWS
        )
        left = gl.minimum(tiles, 1)
        if tiles > 0:
            at, live = rows_of(plan, heads, row, first, count, H, STACK, FORM, M, wide)
            also, same = rows_of(plan, heads, row, first, count, H, STACK, FORM, M, narrow)
            load_queries(q, (at, live, also, same), buffers, told[4], pieces & 1, WHICH)
            pieces += 1
        if FORM == SHARED:
            position = length - 1 + gl.zeros([M], gl.int32, s_rows)
        else:
            query = first + gl.arange(0, M, s_rows) // STACK
            position = length - count + gl.minimum(query, count - 1)
        pairs = (tiles + 1) // 2
        origin = gl.zeros([M], gl.float32, s_rows)
        is_known = turn * 0
        while left > 0:
            acc, total, origin, top = attend_half(
                buffers, told, origin, is_known, position, first_tile, pairs, before, runs, length,
                scale_log2, rings, P, WHICH,
            )  # fmt: skip
            before += pairs
            runs += 1
            # Weights of which the sums leave no room begin again, once, from the largest score.
            left = gl.max((total >= MOST).to(gl.int32), 0) * (1 - is_known)
            is_known = is_known + 1
            if WHICH == 0:
                tell(told[2], told[5], left)
            if left == 0:
                total = gl.where(total > 0, total, 1.0)
                acc_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
                mean = acc * gl.convert_layout(1.0 / total, acc_rows)[:, None]
                lse = gl.convert_layout(origin + gl.log2(total), acc_rows)
                at, live = rows_of(plan, heads, row, first, count, H, STACK, FORM, M, acc_rows)
                column = gl.arange(0, HALF, gl.SliceLayout(0, acc.type.layout))
                columns = WHICH * HALF + column[None, :]
                is_partial = live
                owner, live = rows_of(
                    plan, heads, row, first, count, H, STACK, FORM, M, acc_rows, True
                )
                place = owner * num_partials + split
                if FORM == SHORT:
                    is_partial = live & (parts > 1)
                    place = (at - row.to(gl.int64) * H) * parts + base_partial * H + split
                    whole = out + at[:, None] * RANK + columns
                    gl.store(whole, mean.to(out.dtype.element_ty), (live & (parts < 2))[:, None])
                gl.store(partial_out + place[:, None] * RANK + columns, mean, is_partial[:, None])
                if WHICH == 0:
                    gl.store(partial_lse + place, lse, is_partial)
            else:
                origin = top


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def _latent_pieces_kernel(
    q,
    pages,
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
    num_partials,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    STACK: gl.constexpr,
    RANK: gl.constexpr,
    FORM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PRODUCER: gl.constexpr,
    CONSUMER: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """softmax(scale q (c, r)^T + causal mask) c by pieces of ROWS rows, c the first RANK
    columns of a token's page row, r the others.

    q [T, H, RANK + 64], out [T, H, RANK], pages [B, P, RANK + 64]. FORM SHORT or SHARED, owners and
    pieces as `_hopper_kernel` of attention has them. Four warps ask for tiles, two warpgroups
    attend.
    """
    buffers, rings, told = make_buffers(pages.dtype, ROWS, RANK, BLOCK_N)
    if OVERLAP:  # The other warps begin at warp_specialize, thus after it.
        gdc_wait()
    pieces = H // STACK * gl.load(piece_starts + num_owners)
    plan = (starts, lengths, members, query_starts, sizes, piece_starts, num_owners, 0, pieces)
    turns = gl.cdiv(pieces, gl.num_programs(0))
    P: gl.constexpr = pages.block_shape[1]
    result = (q, out, partial_out, partial_lse, num_partials, scale_log2, buffers, turns, plan,
              told, rings)  # fmt: skip
    source = (pages, block_table, stride_table, turns, plan, told, rings)
    gl.warp_specialize(
        [  # Numbers that variables hold would no longer be constants.
            (_attend, (0, H, STACK, FORM, P) + result),
            (_attend, (1, H, STACK, FORM, P) + result),
            (_produce, (0, H, STACK, FORM) + source),
            (_produce, (1, H, STACK, FORM) + source),
            (_produce, (2, H, STACK, FORM) + source),
            (_produce, (3, H, STACK, FORM) + source),
        ],
        [4, 1, 1, 1, 1],
        [CONSUMER, PRODUCER, PRODUCER, PRODUCER, PRODUCER],
    )


def short_latents(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    out_THR: Tensor,
    partials: Partials,
    plan: ShortPlan,
    num_tokens: int,
    tiles: Tiling,
) -> None:
    """Attends the chunks of a plan, all among the first `num_tokens`: to `out` [T, H, rank] what is
    in one split, else to `partials`."""
    num_sequences = len(batch.seq_lens_S)
    most = (num_tokens // tiles.queries + num_sequences) * plan.limits.splits
    owners = (batch.query_starts, batch.seq_lens_S, batch.query_starts)
    _launch(
        *(SHORT, q_THC, plane, batch, scale, out_THR, partials),
        *(owners, plan.table, plan.table, most, tiles),
    )


def shared_prefixes(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    plan: SharedPrefix,
    partials: Partials,
    tiles: Tiling,
) -> None:
    """Writes to `partials` [S, H, partials] what the members of groups see of the shared tokens."""
    most = (len(plan.members) // tiles.queries + plan.num_groups) * plan.max_splits
    owners = (plan.group_starts, plan.shared_tokens_S, plan.members)
    _launch(
        *(SHARED, q_THC, plane, batch, scale, q_THC, partials),
        *(owners, plan.split_sizes, plan.piece_starts, most, tiles),
    )


def _launch(
    form: gl.constexpr,
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    out: Tensor,
    partials: Partials,
    owners: tuple[Tensor, Tensor, Tensor],
    sizes: Tensor,
    piece_starts: Tensor,
    most_pieces: int,
    tiles: Tiling,
) -> None:
    assert q_THC.is_contiguous()
    _latent_pieces_kernel[(min(most_pieces * tiles.head_groups, tiles.processors),)](
        q_THC,
        described(plane),
        *(out, partials.out, partials.lse),
        *owners,
        batch.query_starts,
        sizes,
        piece_starts,
        batch.block_table,
        len(owners[0]) - 1,
        partials.num_partials,
        batch.block_table.stride(0),
        scale * LOG2_E,
        H=q_THC.shape[1],
        STACK=tiles.stack,
        RANK=plane.rank,
        FORM=form.value,
        BLOCK_N=TILE,
        PRODUCER=PRODUCER_REGISTERS,
        CONSUMER=CONSUMER_REGISTERS,
        num_warps=4,
        **launch_options(q_THC.device),
    )
