"""Tiles of absorbed latent attention on Hopper where a program has many: nothing stands between the
values of one and the scores of the next.

Called by the roles of chunks.py; tiles.py brings the pages, and attends where tiles are few, since
its code is shorter.
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

from octavo.kernels.triton.attention.hopper.tiles import zero_tail


@gluon.jit
def _ask_scores(buffers, now, s_layout: gl.constexpr, rings):
    """Returns the products of queries and the program's `now`-th tile, once it is here, under
    way: two groups of products."""
    q_rank, q_rotated, _ = buffers
    c, r, full, _ = rings
    S: gl.constexpr = c.shape[0]
    N: gl.constexpr = c.shape[1]
    M: gl.constexpr = q_rank.shape[0]
    stage = now % S
    mbarrier.wait(full.index(stage), now // S & 1)
    s = gl.zeros([M, N], gl.float32, s_layout)
    s = warpgroup_mma(q_rank, c.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    return warpgroup_mma(q_rotated, r.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weigh(s, m, total, low, position, start, scale_log2, weights):
    """Stores the weights of the scores s of positions from `start` on; returns (m, total, shrink).
    `total` [M, N]: each column's own, so that nothing is exchanged."""
    # Every tile is masked: a loop without would be as long again, and code comes from memory too.
    n = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    is_seen = (n >= low)[None, :] & (n[None, :] <= position[:, None])
    s = gl.where(is_seen, s, -float("inf"))
    higher = gl.maximum(m, gl.max(s, 1) * scale_log2)
    floor = gl.where(higher == -float("inf"), 0.0, higher)
    p = gl.exp2(s * scale_log2 - floor[:, None])
    shrink = gl.exp2(m - floor)
    weights.store(p.to(weights.dtype))
    return higher, total * shrink[:, None] + p, shrink


@gluon.jit
def attend_many(
    buffers, low, position, first_tile, tiles, base, length, scale_log2, rings,
    P: gl.constexpr,
):  # fmt: skip
    """Returns (mean [M, RANK], log2-sum-exp2 [M]) of the running softmax of positions in [low,
    position[row]] over the tiles, one at least. Layouts as `attend` of tiles.py takes them.

    Values of a tile are summed right before the next one's scores, with nothing between.
    """
    q_rank, _, weights = buffers
    c, _, _, empty = rings
    S: gl.constexpr = c.shape[0]
    N: gl.constexpr = c.shape[1]
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    s_rows: gl.constexpr = position.type.layout
    s_layout: gl.constexpr = s_rows.parent
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    m = gl.full([M], -float("inf"), gl.float32, s_rows)
    total = gl.zeros([M, N], gl.float32, s_layout)
    acc = gl.zeros([M, RANK], gl.float32, acc_layout)
    s = _ask_scores(buffers, base, s_layout, rings)
    s = warpgroup_mma_wait(0, deps=(s,))
    m, total, _ = _weigh(s, m, total, low, position, first_tile * N, scale_log2, weights)
    for tile in range(1, tiles):
        before = (base + tile - 1) % S
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(weights, c.index(before), acc, is_async=True)
        s = _ask_scores(buffers, base + tile, s_layout, rings)
        acc = warpgroup_mma_wait(2, deps=(acc,))
        gl.thread_barrier()  # Both warpgroups have read the tile and the weights.
        mbarrier.arrive(empty.index(before))
        s = warpgroup_mma_wait(0, deps=(s,))
        start = (first_tile + tile) * N
        m, total, shrink = _weigh(s, m, total, low, position, start, scale_log2, weights)
        acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
    last = (base + tiles - 1) % S
    if (length < (first_tile + tiles) * N) & (length % P > 0):
        zero_tail(c, last, length, P)
    fence_async_shared()
    gl.thread_barrier()
    acc = warpgroup_mma(weights, c.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    mbarrier.arrive(empty.index(last))
    sums = gl.sum(total, 1)
    sums = gl.where(sums > 0, sums, 1.0)
    lse = gl.convert_layout(m + gl.log2(sums), acc_rows)
    return acc * gl.convert_layout(1.0 / sums, acc_rows)[:, None], lse
