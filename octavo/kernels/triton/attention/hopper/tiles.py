"""One piece of attention on Hopper: tiles of keys and values by TMA, products beside the softmax.

Called by the kernel's roles (kernel.py). Never knows whose rows these are.
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


@gluon.jit
def load_tile(pages, source, column, ring, stage, full):
    """Brings a tile [BLOCK_N, D] by pages; TMA and wgmma want its halves of 64 columns apart."""
    N: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    P: gl.constexpr = source.block_shape[1]
    COLUMNS: gl.constexpr = source.block_shape[2]
    shape: gl.constexpr = [D // COLUMNS * N // P, 1, P, COLUMNS]
    to = ring.index(stage)._reinterpret(ring.dtype, shape, source.layout)
    mbarrier.expect(full.index(stage), N * D * 2)
    for half in gl.static_range(D // COLUMNS):
        for i in gl.static_range(N // P):
            tma.async_copy_global_to_shared(
                source,
                [pages[i], 0, column + half * COLUMNS],
                full.index(stage),
                to.index(half * (N // P) + i),
            )


@gluon.jit
def pages_of(table_row, tile, length, N: gl.constexpr, P: gl.constexpr):
    """Returns a tile's pages. Behind the sequence's end there is -1, of which TMA makes zeros."""
    pages = ()
    for i in gl.static_range(N // P):
        at = tile * (N // P) + i
        page = gl.load(table_row + at, mask=at * P < length, other=-1)
        pages = pages + (page,)
    return pages


@gluon.jit
def zero_tail(v, stage, length, P: gl.constexpr):
    """Clears the values behind the sequence's end in its last page: 0 times NaN would be NaN.

    Both consumers do it, writing what the other may read already as the same bits.
    """
    N: gl.constexpr = v.shape[1]
    HALVES: gl.constexpr = v.shape[2] // 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    page = length % N // P
    pages = v.index(stage)._reinterpret(v.dtype, [HALVES * N // P, P, 64], v.layout)
    row = gl.arange(0, P, gl.SliceLayout(1, LAYOUT))
    for half in gl.static_range(HALVES):
        there = pages.index(half * (N // P) + page)
        values = there.load(LAYOUT)
        there.store(gl.where((row < length % P)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def softmax(s, m, total, position, start, scale_log2, MASKED: gl.constexpr):
    """Returns (p, m, total, shrink) of the running softmax after the scores s."""
    layout: gl.constexpr = s.type.layout
    if MASKED:
        n = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        s = gl.where(n[None, :] <= position[:, None], s, -float("inf"))
    higher = gl.maximum(m, gl.max(s, 1) * scale_log2)
    floor = higher
    if MASKED:  # A row may see nothing of a split.
        floor = gl.where(higher == -float("inf"), 0.0, higher)
    p = gl.exp2(s * scale_log2 - floor[:, None])
    shrink = gl.exp2(m - floor)
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def advance(
    acc, p, m, total, shrink, q, position, first_tile, tile, tiles, base, scale_log2, rings,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Issues q k^T of `tile` and p v of the tile before, and takes the softmax of the former while
    the latter runs. `base`: KV tiles before this piece."""
    k, v, k_full, k_empty, v_full, v_empty = rings
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    s_layout: gl.constexpr = m.type.layout.parent
    acc_layout: gl.constexpr = acc.type.layout
    now = base + tile
    stage = now % S
    before = (now - 1) % S
    s = gl.zeros([m.shape[0], N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (now - 1) // S & 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    start = (first_tile + tile) * N
    x, m, total, shrink = softmax(s, m, total, position, start, scale_log2, MASKED)
    # A branch, and `total`: else the compiler waits for p v before it takes the exponentials.
    mbarrier.wait(k_full.index((now + 1) % S), (now + 1) // S & 1, pred=tile + 1 < tiles)
    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
    mbarrier.arrive(v_empty.index(before))
    return acc, gl.convert_layout(x.to(p.dtype), p.type.layout), m, total, shrink


@gluon.jit
def attend(
    q, rings, base, position, seen, first_tile, tiles, length, scale_log2, P: gl.constexpr
):  # fmt: skip
    """Returns softmax(scale q k^T) v over the tiles and its log2-sum-exp2: 0 and -inf where a row
    sees none. Every row sees all before `seen`."""
    k, v, k_full, k_empty, v_full, v_empty = rings
    M: gl.constexpr = q.shape[0]
    D: gl.constexpr = q.shape[1]
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    rows: gl.constexpr = position.type.layout
    s_layout: gl.constexpr = rows.parent
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    m = gl.full([M], -float("inf"), gl.float32, rows)
    total = gl.zeros([M], gl.float32, rows)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    mbarrier.wait(k_full.index(base % S), base // S & 1)
    s = gl.zeros([M, N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(base % S).permute((1, 0)), s, use_acc=False)
    mbarrier.arrive(k_empty.index(base % S))
    x, m, total, shrink = softmax(s, m, total, position, first_tile * N, scale_log2, True)
    p = gl.convert_layout(x.to(q.dtype), p_layout)
    mbarrier.wait(k_full.index((base + 1) % S), (base + 1) // S & 1, pred=tiles > 1)
    whole = gl.maximum(gl.minimum(seen // N - first_tile, tiles), 1)
    for tile in range(1, whole):
        acc, p, m, total, shrink = advance(
            acc, p, m, total, shrink, q, position, first_tile, tile, tiles, base, scale_log2,
            rings, False,
        )  # fmt: skip
    for tile in range(whole, tiles):
        acc, p, m, total, shrink = advance(
            acc, p, m, total, shrink, q, position, first_tile, tile, tiles, base, scale_log2,
            rings, True,
        )  # fmt: skip
    last = base + tiles - 1
    mbarrier.wait(v_full.index(last % S), last // S & 1)
    if (length < (first_tile + tiles) * N) & (length % P > 0):
        zero_tail(v, last % S, length, P)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(last % S), acc)
    mbarrier.arrive(v_empty.index(last % S))
    total = gl.where(total > 0, total, 1.0)
    lse = gl.convert_layout(m + gl.log2(total), gl.SliceLayout(1, acc_layout))
    return acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))[:, None], lse


@gluon.jit
def pass_by(rings, base, tiles):
    """Lets the tiles by of a piece in which this consumer has no rows."""
    k, _, k_full, k_empty, v_full, v_empty = rings
    S: gl.constexpr = k.shape[0]
    for tile in range(base, base + tiles):
        mbarrier.wait(k_full.index(tile % S), tile // S & 1)
        mbarrier.arrive(k_empty.index(tile % S))
        mbarrier.wait(v_full.index(tile % S), tile // S & 1)
        mbarrier.arrive(v_empty.index(tile % S))
