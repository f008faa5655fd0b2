"""Tiles of absorbed latent attention on Hopper where a program has many: two warpgroups, each with
the scores of every second tile and with half of the columns of all sums.

Used by the roles of chunks.py. While one warpgroup weighs its scores, the other's products run. All
weights of a piece are of one origin, the largest score of its first tile, so that nothing is ever
rescaled; they lie where the tile's rotated columns lay. Halves of a tile's columns come and go by
themselves: the half that is needed first is the one that is free first. Never knows whose rows
these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.triton.attention.hopper.tiles import zero_tail
from octavo.kernels.triton.latent.hopper.tiles import PRODUCERS, ROTATED


@gluon.jit
def make_buffers(dtype: gl.constexpr, M: gl.constexpr, RANK: gl.constexpr, N: gl.constexpr):
    """Returns (queries: halves of their first RANK columns, their rotated ones), rings of two
    tiles, and what warpgroups tell each other and producers: (the origin of weights; top and total
    of each; whether all begins again; barriers: weights of even and of odd tiles are there; queries
    are, tops and totals are; whether all begins again is known)."""
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [2, M, RANK // 2], flat)
    q_rotated = gl.allocate_shared_memory(dtype, [M, ROTATED], flat)
    c = gl.allocate_shared_memory(dtype, [4, N, RANK // 2], flat)
    r = gl.allocate_shared_memory(dtype, [2, N, ROTATED], flat)
    origins = gl.allocate_shared_memory(gl.float32, [M], line)
    sides = gl.allocate_shared_memory(gl.float32, [4, M], line)
    again = gl.allocate_shared_memory(gl.int32, [1], line)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], barrier)
    given = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    both = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    judged = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(both.index(i), count=2)
    mbarrier.init(judged.index(0), count=1)
    fence_async_shared()
    told = (origins, sides, again, given, both, judged.index(0))
    return (q, q_rotated), (c, r, full, empty), told


@gluon.jit
def _bring_half(
    page, source, rings, STAGE: gl.constexpr, HALF: gl.constexpr, ALSO: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """Brings the INDEX-th share of half the columns of a tile, and of the rotated ones if ALSO."""
    c, r, full, _ = rings
    P: gl.constexpr = source.block_shape[1]
    PAGES: gl.constexpr = c.shape[1] // P
    PARTS: gl.constexpr = c.shape[2] // ROTATED
    ALL: gl.constexpr = PARTS + ALSO
    FIRST: gl.constexpr = INDEX // PAGES
    STEP: gl.constexpr = PRODUCERS // PAGES
    AT: gl.constexpr = INDEX % PAGES
    barrier = full.index(2 * STAGE + HALF)
    mine: gl.constexpr = (ALL + STEP - 1 - FIRST) // STEP
    mbarrier.expect(barrier, mine * P * ROTATED * 2)
    to = c.index(2 * STAGE + HALF)
    to = to._reinterpret(c.dtype, [PARTS * PAGES, 1, P, ROTATED], source.layout)
    for part in gl.static_range(FIRST, ALL, STEP):
        if part < PARTS:
            at = [page, 0, (HALF * PARTS + part) * ROTATED]
            tma.async_copy_global_to_shared(source, at, barrier, to.index(part * PAGES + AT))
        else:
            rest = r.index(STAGE)._reinterpret(r.dtype, [PAGES, 1, P, ROTATED], source.layout)
            at = [page, 0, 2 * PARTS * ROTATED]
            tma.async_copy_global_to_shared(source, at, barrier, rest.index(AT))


@gluon.jit
def produce_pairs(
    pages, table_row, length, first_tile, pairs, before, rings, INDEX: gl.constexpr
):  # fmt: skip
    """Brings a producer's share of 2 * pairs tiles of a sequence from `first_tile` on; `before`:
    pairs brought before. Behind the sequence's end TMA makes zeros of page -1."""
    c, _, _, empty = rings
    P: gl.constexpr = pages.block_shape[1]
    PAGES: gl.constexpr = c.shape[1] // P
    for pair in range(pairs):
        phase = before + pair & 1 ^ 1
        for STAGE in gl.static_range(2):
            at = (first_tile + 2 * pair + STAGE) * PAGES + INDEX % PAGES
            page = gl.load(table_row + at, mask=at * P < length, other=-1)
            # The tile's own warpgroup is done with it first, and needs its half of the next first.
            mbarrier.wait(empty.index(2 * STAGE + STAGE), phase)
            _bring_half(page, pages, rings, STAGE, STAGE, 0, INDEX)
            mbarrier.wait(empty.index(2 * STAGE + 1 - STAGE), phase)
            _bring_half(page, pages, rings, STAGE, 1 - STAGE, 1, INDEX)


@gluon.jit
def load_queries(q_TC, plan_rows, buffers, both, phase, WHICH: gl.constexpr):
    """Copies a warpgroup's part of rows of q [rows, RANK + ROTATED] to shared memory, 0 where not
    live; the rows in both of `row_layouts`. Returns when all are there."""
    at, live, also, same = plan_rows
    q, q_rotated = buffers
    HALF: gl.constexpr = q.shape[2]
    COLUMNS: gl.constexpr = 2 * HALF + ROTATED
    columns = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(0, at.type.layout.parent))
    there = q_TC + at[:, None] * COLUMNS + columns[None, :]
    q.index(WHICH).store(gl.load(there, mask=live[:, None], other=0.0))
    if WHICH == 1:
        columns = 2 * HALF + gl.arange(0, ROTATED, gl.SliceLayout(0, also.type.layout.parent))
        there = q_TC + also[:, None] * COLUMNS + columns[None, :]
        q_rotated.store(gl.load(there, mask=same[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(both.index(0))
    mbarrier.wait(both.index(0), phase)


@gluon.jit
def _ask_scores(
    s, buffers, rings, phase, none, HALF: gl.constexpr, WHICH: gl.constexpr
):  # fmt: skip
    """Returns s and the products of half of the columns of queries and of the warpgroup's next tile
    (with the second half, of the rotated ones too), once they are here, under way. `none` is 0; a
    compiler that knew would keep all addresses of products in registers."""
    q, q_rotated = buffers
    c, r, full, _ = rings
    mbarrier.wait(full.index(2 * WHICH + HALF), phase)
    c_T = c.index(none + 2 * WHICH + HALF).permute((1, 0))
    s = warpgroup_mma(q.index(none + HALF), c_T, s, use_acc=HALF != WHICH, is_async=True)
    if HALF != WHICH:
        s = warpgroup_mma(q_rotated, r.index(none + WHICH).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _hidden(s, position, start):
    """Returns s without what lies behind each row's position."""
    n = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where(n[None, :] <= position[:, None], s, -float("inf"))


@gluon.jit
def _eighths(x):
    """Returns x [M, N] as [M, N / 8, 8]: what a thread has of the middle is its own."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def _floor(top):
    """Returns the exponents that make the largest weights 1 where there are any."""
    return gl.where(top == -float("inf"), 0.0, top)


@gluon.jit
def _give(s, origin, top, total, scale_log2, rings, given, WHICH: gl.constexpr):
    """Stores the weights of scores and says so; returns (top, total) with theirs."""
    _, r, _, _ = rings
    p = gl.exp2(s * scale_log2 - origin[:, None])
    r.index(WHICH).store(p.to(r.dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(given.index(WHICH))
    return gl.maximum(top, gl.max(_eighths(s), 1)), total + gl.sum(_eighths(p), 1)


@gluon.jit
def _ask_sums(
    acc, rings, none, tile, length, STAGE: gl.constexpr, P: gl.constexpr, WHICH: gl.constexpr
):  # fmt: skip
    """Returns acc with the weighted values of a tile, on their way."""
    c, r, _, _ = rings
    N: gl.constexpr = c.shape[1]
    if (length > tile * N) & (length < (tile + 1) * N) & (length % P > 0):
        zero_tail(c, 2 * STAGE + WHICH, length, P)
    values = c.index(none + 2 * STAGE + WHICH)
    return warpgroup_mma(r.index(none + STAGE), values, acc, is_async=True)


@gluon.jit
def _free(rings, STAGE: gl.constexpr, WHICH: gl.constexpr):
    """Tells producers that half a tile is no longer needed."""
    gl.thread_barrier()
    mbarrier.arrive(rings[3].index(2 * STAGE + WHICH))


@gluon.jit
def tell(again, judged, left):
    """Tells producers whether all begins again."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    again.store(gl.full([1], 0, gl.int32, line) + left)
    gl.thread_barrier()
    mbarrier.arrive(judged)


@gluon.jit
def hear(again, judged, phase):
    """Returns what `tell` told."""
    mbarrier.wait(judged, phase)
    return gl.max(again.load(gl.BlockedLayout([1], [32], [1], [0])), 0)


@gluon.jit
def attend_half(
    buffers, told, origin, is_known, position, first_tile, pairs, before, runs, length, scale_log2,
    rings, P: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Returns (sums [M, RANK / 2], total [M], origin [M], largest score as an exponent [M]) of the
    positions up to position[row] in 2 * pairs tiles: sums of half WHICH of the columns, whose
    warpgroup scores tiles 2 i + WHICH. Weights are 2^(score - origin), the origin given if
    `is_known`, else the largest score of the first tile. `before`, `runs`: pairs and calls of this
    function that the program had before."""
    origins, sides, _, given, both, _ = told
    q = buffers[0]
    N: gl.constexpr = rings[0].shape[1]
    M: gl.constexpr = q.shape[1]
    HALF: gl.constexpr = q.shape[2]
    OTHER: gl.constexpr = 1 - WHICH
    rows: gl.constexpr = position.type.layout
    layout: gl.constexpr = rows.parent
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    empty = gl.zeros([M, N], gl.float32, layout)
    top = gl.max(_eighths(empty - float("inf")), 1)
    total = gl.sum(_eighths(empty), 1)
    acc = gl.zeros([M, HALF], gl.float32, acc_layout)
    zero = runs & length >> 31
    if WHICH == 0:
        s = _ask_scores(empty, buffers, rings, before & 1, zero, 0, 0)
        s = _ask_scores(s, buffers, rings, before & 1, zero, 1, 0)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = _hidden(s, position, first_tile * N)
        if is_known == 0:
            origin = _floor(gl.max(s, 1) * scale_log2)
        origins.store(origin)
        top, total = _give(s, origin, top, total, scale_log2, rings, given, 0)
        acc = _ask_sums(acc, rings, zero, first_tile, length, 0, P, 0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(rings, 0, 0)
    for pair in range(1 - WHICH, pairs):
        tile = first_tile + 2 * pair + WHICH
        phase = before + pair & 1
        none = pair & length >> 31
        s = _ask_scores(empty, buffers, rings, phase, none, WHICH, WHICH)
        # The other's tile before: its room is wanted soonest.
        mbarrier.wait(given.index(OTHER), phase ^ 1 ^ WHICH)
        acc = _ask_sums(acc, rings, none, tile - 1, length, OTHER, P, WHICH)
        acc, s = warpgroup_mma_wait(0, deps=(acc, s))
        _free(rings, OTHER, WHICH)
        s = _ask_scores(s, buffers, rings, phase, none, OTHER, WHICH)
        if WHICH == 1:
            origin = origins.load(rows)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = _hidden(s, position, tile * N)
        top, total = _give(s, origin, top, total, scale_log2, rings, given, WHICH)
        acc = _ask_sums(acc, rings, none, tile, length, WHICH, P, WHICH)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(rings, WHICH, WHICH)
    if WHICH == 0:
        mbarrier.wait(given.index(1), before + pairs & 1 ^ 1)
        acc = _ask_sums(acc, rings, zero, first_tile + 2 * pairs - 1, length, 1, P, 0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(rings, 1, 0)
    top = gl.convert_layout(gl.max(top, 1), rows) * scale_log2
    total = gl.convert_layout(gl.sum(total, 1), rows)
    sides.index(2 * WHICH).store(top)
    sides.index(2 * WHICH + 1).store(total)
    gl.thread_barrier()
    mbarrier.arrive(both.index(1))
    mbarrier.wait(both.index(1), runs & 1)
    top = gl.maximum(top, sides.index(2 * OTHER).load(rows))
    return acc, total + sides.index(2 * OTHER + 1).load(rows), origin, _floor(top)
