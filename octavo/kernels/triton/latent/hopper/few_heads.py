"""Absorbed latent attention of many sequences with one query and few heads, on Hopper.

Called by latent/decode.py where `is_for` says so, as lone.py is elsewhere. Tokens are the rows of
both products, of scores [tokens, heads] and of sums [RANK, heads], so that 16 heads leave nothing
unused. Two warpgroups attend tiles in turn, each with sums of its own. Pages that steps before this
one wrote are asked for before the kernel's turn has come (launching/overlap.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton.attention.hopper.shares import merge_shares
from octavo.kernels.triton.attention.hopper.tiles import zero_tail
from octavo.kernels.triton.latent.hopper import rows as lone_rows
from octavo.kernels.triton.latent.hopper.rows import LoneRows, own_share
from octavo.kernels.triton.latent.hopper.tiles import (
    PRODUCER_REGISTERS,
    PRODUCERS,
    ROTATED,
    STAGES,
    produce,
)
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options

UNSPECIALISED = [*lone_rows.UNSPECIALISED, "stages"]
MOST_HEADS = 16
"""Columns of a tile of scores."""
MOST_PROGRAMS = 2
"""Of a row: with more there is little to attend in each, and lone.py's code, which is shorter, is
there sooner."""
REGISTERS = 128
"""Of a thread at the launch: as many as leave room for programs of the kernel before."""
CONSUMER_REGISTERS = 152


@gluon.jit
def _make_buffers(dtype: gl.constexpr, M: gl.constexpr, RANK: gl.constexpr, N: gl.constexpr):
    """Returns shared memory: (queries' first RANK columns, their rotated ones, weights of each
    consumer), rings of tiles with their barriers, and (sums, tops, totals, barriers) that the
    second consumer leaves: barrier 0 is told when queries are there, 1 when its sums are."""
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(M * 2, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_rank = gl.allocate_shared_memory(dtype, [M, RANK], flat)
    q_rotated = gl.allocate_shared_memory(dtype, [M, ROTATED], flat)
    weights = gl.allocate_shared_memory(dtype, [STAGES, N, M], narrow)
    c = gl.allocate_shared_memory(dtype, [STAGES, N, RANK], flat)
    r = gl.allocate_shared_memory(dtype, [STAGES, N, ROTATED], flat)
    sums = gl.allocate_shared_memory(gl.float32, [RANK, M], plain)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tops = gl.allocate_shared_memory(gl.float32, [M], line)
    totals = gl.allocate_shared_memory(gl.float32, [M], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(told.index(i), count=1)
    fence_async_shared()
    return (q_rank, q_rotated, weights), (c, r, full, empty), (sums, tops, totals, told)


@gluon.jit
def _load_queries(q, row, H: gl.constexpr, q_rank, q_rotated):
    """Copies rows row .. row + H of q to shared memory, zeros behind them."""
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    COLUMNS: gl.constexpr = RANK + ROTATED
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    at = gl.arange(0, M, gl.SliceLayout(1, wide))
    columns = gl.arange(0, RANK, gl.SliceLayout(0, wide))
    there = q + (row + at)[:, None] * COLUMNS + columns[None, :]
    x = gl.load(there, mask=(at < H)[:, None], other=0.0)
    also = gl.arange(0, M, gl.SliceLayout(1, narrow))
    columns = RANK + gl.arange(0, ROTATED, gl.SliceLayout(0, narrow))
    there = q + (row + also)[:, None] * COLUMNS + columns[None, :]
    y = gl.load(there, mask=(also < H)[:, None], other=0.0)
    q_rank.store(x)
    q_rotated.store(y)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend(buffers, low, first_tile, tiles, length, scale_log2, stages, rings, P: gl.constexpr,
            WHICH: gl.constexpr):  # fmt: skip
    """Returns (sums [RANK, M], top [M], total [M]) of the running softmax of positions in [low,
    length) over every second tile from the WHICH-th on."""
    q_rank, q_rotated, weights = buffers
    c, r, full, empty = rings
    M: gl.constexpr = q_rank.shape[0]
    N: gl.constexpr = c.shape[1]
    RANK: gl.constexpr = c.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    of_heads: gl.constexpr = gl.SliceLayout(0, layout)
    m = gl.full([M], -float("inf"), gl.float32, of_heads)
    total = gl.zeros([N, M], gl.float32, layout)
    acc = gl.zeros([RANK, M], gl.float32, layout)
    for tile in range(WHICH, tiles, STAGES):
        # Always WHICH, but a compiler that knew would keep all addresses of products in registers.
        stage = tile % stages
        mbarrier.wait(full.index(stage), tile // STAGES & 1)
        s = gl.zeros([N, M], gl.float32, layout)
        s = warpgroup_mma(c.index(stage), q_rank.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma(r.index(stage), q_rotated.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        n = (first_tile + tile) * N + gl.arange(0, N, gl.SliceLayout(1, layout))
        s = gl.where(((n >= low) & (n < length))[:, None], s * scale_log2, -float("inf"))
        higher = gl.maximum(m, gl.max(s, 0))
        floor = gl.where(higher == -float("inf"), 0.0, higher)
        p = gl.exp2(s - floor[None, :])
        shrink = gl.exp2(m - floor)
        m = higher
        total = total * shrink[None, :] + p
        weights.index(stage).store(p.to(weights.dtype))
        if (tile + 1 == tiles) & (length < (first_tile + tile + 1) * N) & (length % P > 0):
            zero_tail(c, stage, length, P)
        acc = acc * shrink[None, :]
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(
            c.index(stage).permute((1, 0)), weights.index(stage), acc, is_async=True
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage))
    return acc, m, gl.sum(total, 0)


@gluon.jit
def _second(P: gl.constexpr, scale_log2, stages, buffers, work, rings, passed):
    """Attends every second tile and leaves its sums to the first consumer."""
    low, length, _, first_tile, tiles = work
    sums, tops, totals, told = passed
    mbarrier.wait(told.index(0), 0)
    acc, m, total = _attend(
        buffers, low, first_tile, tiles, length, scale_log2, stages, rings, P, 1
    )
    sums.store(acc)
    tops.store(m)
    totals.store(total)
    gl.thread_barrier()
    mbarrier.arrive(told.index(1))


@gluon.jit
def _first(
    H: gl.constexpr, P: gl.constexpr, HEADS: gl.constexpr, q, out, partial_out, partial_lse, firsts,
    num_partials, ticket, scale_log2, stages, buffers, place, work, rings, passed,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """Attends every second tile, adds what the second consumer found, and merges this program's
    part of the row's results."""
    q_rank, q_rotated, _ = buffers
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    of_heads: gl.constexpr = gl.SliceLayout(0, layout)
    t, _, heads, split, num_busy, before = place
    low, length, _, first_tile, tiles = work
    sums, tops, totals, told = passed
    stride = num_partials.to(gl.int64)
    row = t * H + heads
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    if tiles > 0:
        _load_queries(q, row, H, q_rank, q_rotated)
    mbarrier.arrive(told.index(0))
    if tiles > 0:
        acc, m, total = _attend(
            buffers, low, first_tile, tiles, length, scale_log2, stages, rings, P, 0
        )
        head = gl.arange(0, M, of_heads)
        columns = gl.arange(0, RANK, gl.SliceLayout(1, layout))[:, None]
        mbarrier.wait(told.index(1), 0)
        other_m = tops.load(of_heads)
        other_total = totals.load(of_heads)
        higher = gl.maximum(m, other_m)
        floor = gl.where(higher == -float("inf"), 0.0, higher)
        mine, others = gl.exp2(m - floor), gl.exp2(other_m - floor)
        total = total * mine + other_total * others
        total = gl.where(total > 0, total, 1.0)
        lse = higher + gl.log2(total)
        scaled = mine / total
        mean = acc * scaled[None, :] + sums.load(layout) * (others / total)[None, :]
        is_alone = (num_busy == 1) & (before == 0)
        live = head < H
        whole = out + (row + head)[None, :] * RANK + columns
        gl.store(whole, mean.to(out.dtype.element_ty), (live & is_alone)[None, :])
        to = firsts + head * stride + before + split
        is_partial = live & (num_busy + before > 1)
        gl.store(partial_out + to[None, :] * RANK + columns, mean, is_partial[None, :])
        gl.store(partial_lse + to, lse, is_partial)
    merge_shares(
        out, partial_out, partial_lse, place, tiles, firsts, stride, ticket, H, H, RANK, HEADS
    )


@gluon.jit
def _produce(
    INDEX: gl.constexpr, OVERLAP: gl.constexpr, pages, table_row, length, first_tile, tiles, rings
):  # fmt: skip
    """Brings a producer's share of the tiles. All but the sequence's last one were written by steps
    before this one, and come before the kernel's turn."""
    N: gl.constexpr = rings[0].shape[1]
    is_last = ((first_tile + tiles) * N >= length) & (tiles > 0)
    early = tiles - is_last.to(gl.int32)
    produce(pages, table_row, length, first_tile, early, 0, rings, INDEX)
    if OVERLAP:
        gdc_wait()
    produce(pages, table_row, length, first_tile + early, tiles - early, early, rings, INDEX)


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def _few_heads_kernel(
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
    stages,
    H: gl.constexpr,
    M: gl.constexpr,
    RANK: gl.constexpr,
    HAS_SHARED: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PRODUCER: gl.constexpr,
    CONSUMER: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """All H heads of a sequence (`program 1`) with one query, a share (2) of its keys.

    out [T, H, RANK] = softmax(scale q (c, r)^T) c over [low, length); q [T, H, RANK + 64], pages
    [B, P, RANK + 64]; M >= H. Partial results and HAS_SHARED as in attention/decode.py, but that a
    share leaves one. Programs of a row must be able to run at the same time. Two warpgroups
    attend, four warps ask for tiles. `stages` is STAGES.
    """
    buffers, rings, passed = _make_buffers(pages.dtype, M, RANK, BLOCK_N)
    place, work, firsts, ticket, table_row = own_share(
        query_starts, seq_lens, shared_tokens, shared_partials, num_partials, tickets, block_table,
        stride_table, H, H, HAS_SHARED, BLOCK_N,
    )  # fmt: skip
    _, length, _, first_tile, tiles = work
    P: gl.constexpr = pages.block_shape[1]
    result = (q, out, partial_out, partial_lse, firsts, num_partials, ticket, scale_log2,
              stages, buffers, place, work, rings, passed)  # fmt: skip
    source = (pages, table_row, length, first_tile, tiles, rings)
    gl.warp_specialize(
        [  # Numbers that variables hold would no longer be constants.
            (_first, (H, P, HEADS) + result + (OVERLAP,)),
            (_second, (P, scale_log2, stages, buffers, work, rings, passed)),
            (_produce, (0, OVERLAP) + source),
            (_produce, (1, OVERLAP) + source),
            (_produce, (2, OVERLAP) + source),
            (_produce, (3, OVERLAP) + source),
        ],
        [4, 1, 1, 1, 1],
        [CONSUMER, PRODUCER, PRODUCER, PRODUCER, PRODUCER],
    )


def is_for(num_rows: int, num_heads: int, processors: int) -> bool:
    """Whether so many rows are attended here."""
    return num_heads <= MOST_HEADS and processors // num_rows <= MOST_PROGRAMS


def few_head_latents(rows: LoneRows) -> None:
    """As `lone_latents`."""
    assert rows.num_heads <= MOST_HEADS, rows.num_heads
    _few_heads_kernel[rows.grid(1)](
        *rows.arguments,
        STAGES.value,
        **rows.constants,
        M=MOST_HEADS,
        HEADS=2,
        PRODUCER=PRODUCER_REGISTERS,
        CONSUMER=CONSUMER_REGISTERS,
        num_warps=4,
        maxnreg=REGISTERS,
        **launch_options(rows.q_THC.device),
    )
