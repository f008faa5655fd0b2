"""Tiles of latent attention on Hopper: pages by TMA, products by both warpgroups of a program.

Called by the kernels' roles: lone.py, and few_heads.py for what brings pages; seesaw.py has its own
way. Each warpgroup has all rows of a tile and half of their columns, of scores and of sums. Never
knows whose rows these are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.triton.attention.hopper.kernel import PAGE_LAYOUT
from octavo.kernels.triton.attention.hopper.tiles import pages_of, softmax, zero_tail
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.chip import has_wgmma

ROTATED = gl.constexpr(64)
"""Columns that TMA brings at once, and the rotated ones of a token."""
TILE = 64
"""Tokens of a tile: two of them and the rows of queries fill the shared memory."""
STAGES = gl.constexpr(2)
PRODUCERS = gl.constexpr(4)
"""Warps that ask for tiles: one alone takes as long to ask as the others take to attend."""
PRODUCER_REGISTERS = 40


@gluon.jit
def make_buffers(dtype: gl.constexpr, M: gl.constexpr, RANK: gl.constexpr, N: gl.constexpr):
    """Returns ((queries' first RANK columns, their rotated ones, weights), rings): shared memory
    of M rows and of STAGES tiles of N tokens, with their barriers."""
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_rank = gl.allocate_shared_memory(dtype, [M, RANK], flat)
    q_rotated = gl.allocate_shared_memory(dtype, [M, ROTATED], flat)
    weights = gl.allocate_shared_memory(dtype, [M, N], flat)
    c = gl.allocate_shared_memory(dtype, [STAGES, N, RANK], flat)
    r = gl.allocate_shared_memory(dtype, [STAGES, N, ROTATED], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=PRODUCERS)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return (q_rank, q_rotated, weights), (c, r, full, empty)


@gluon.jit
def _bring(pages, source, c, r, stage, full, INDEX: gl.constexpr):
    """Brings the INDEX-th share of a tile: latent vectors [N, RANK] and rotated columns [N,
    ROTATED], by pages and ROTATED columns."""
    N: gl.constexpr = c.shape[1]
    P: gl.constexpr = source.block_shape[1]
    PAGES: gl.constexpr = N // P
    PARTS: gl.constexpr = c.shape[2] // ROTATED
    BOXES: gl.constexpr = (PARTS + 1) * PAGES
    c_pages = c.index(stage)._reinterpret(c.dtype, [PARTS * PAGES, 1, P, ROTATED], source.layout)
    r_pages = r.index(stage)._reinterpret(r.dtype, [PAGES, 1, P, ROTATED], source.layout)
    barrier = full.index(stage)
    mine: gl.constexpr = (BOXES + PRODUCERS - 1 - INDEX) // PRODUCERS
    mbarrier.expect(barrier, mine * P * ROTATED * 2)
    for box in gl.static_range(INDEX, BOXES, PRODUCERS):
        at = [pages[box % PAGES], 0, box // PAGES * ROTATED]
        if box < PARTS * PAGES:
            tma.async_copy_global_to_shared(source, at, barrier, c_pages.index(box))
        else:
            to = r_pages.index(box - PARTS * PAGES)
            tma.async_copy_global_to_shared(source, at, barrier, to)


@gluon.jit
def produce(
    pages, table_row, length, first_tile, tiles, base, rings, INDEX: gl.constexpr
):  # fmt: skip
    """Brings a producer's share of `tiles` tiles of a sequence from `first_tile` on; `base`: tiles
    brought before."""
    c, r, full, empty = rings
    S: gl.constexpr = c.shape[0]
    N: gl.constexpr = c.shape[1]
    for tile in range(tiles):
        stage = (base + tile) % S
        here = pages_of(table_row, first_tile + tile, length, N, pages.block_shape[1])
        mbarrier.wait(empty.index(stage), (base + tile) // S & 1 ^ 1)
        _bring(here, pages, c, r, stage, full, INDEX)


@gluon.jit
def load_queries(q, at_wide, live_wide, at_narrow, live_narrow, q_rank, q_rotated):
    """Copies rows of q [rows, RANK + ROTATED] to shared memory, 0 where not live; rows in both of
    the layouts of `row_layouts`."""
    RANK: gl.constexpr = q_rank.shape[1]
    COLUMNS: gl.constexpr = RANK + ROTATED
    columns = gl.arange(0, RANK, gl.SliceLayout(0, at_wide.type.layout.parent))
    there = q + at_wide[:, None] * COLUMNS + columns[None, :]
    q_rank.store(gl.load(there, mask=live_wide[:, None], other=0.0))
    columns = RANK + gl.arange(0, ROTATED, gl.SliceLayout(0, at_narrow.type.layout.parent))
    there = q + at_narrow[:, None] * COLUMNS + columns[None, :]
    q_rotated.store(gl.load(there, mask=live_narrow[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend_tile(
    acc, m, total, buffers, low, position, now, tile, length, is_last, scale_log2, rings,
    P: gl.constexpr,
):  # fmt: skip
    """Adds the tile of positions from tile * N on, the `now`-th of the program, to the running
    softmax."""
    q_rank, q_rotated, weights = buffers
    c, r, full, empty = rings
    S: gl.constexpr = c.shape[0]
    N: gl.constexpr = c.shape[1]
    s_layout: gl.constexpr = m.type.layout.parent
    stage = now % S
    mbarrier.wait(full.index(stage), now // S & 1)
    s = gl.zeros([m.shape[0], N], gl.float32, s_layout)
    s = warpgroup_mma(q_rank, c.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(q_rotated, r.index(stage).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    # Every tile is masked: a loop without would be as long again, and code comes from memory too.
    n = tile * N + gl.arange(0, N, gl.SliceLayout(0, s_layout))
    s = gl.where((n >= low)[None, :], s, -float("inf"))
    p, m, total, shrink = softmax(s, m, total, position, tile * N, scale_log2, True)
    weights.store(p.to(weights.dtype))
    if is_last & (length < (tile + 1) * N) & (length % P > 0):
        zero_tail(c, stage, length, P)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    fence_async_shared()
    gl.thread_barrier()
    acc = warpgroup_mma(weights, c.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()  # Both warpgroups have read the tile and the weights.
    mbarrier.arrive(empty.index(stage))
    return acc, m, total


@gluon.jit
def attend(
    buffers, low, position, first_tile, tiles, base, length, scale_log2, rings,
    P: gl.constexpr,
):  # fmt: skip
    """Returns (mean [M, RANK], log2-sum-exp2 [M]) of the running softmax of positions in [low,
    position[row]] over the tiles. Layouts as `layouts` has them."""
    q_rank, _, _ = buffers
    M: gl.constexpr = q_rank.shape[0]
    RANK: gl.constexpr = q_rank.shape[1]
    s_rows: gl.constexpr = position.type.layout
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    m = gl.full([M], -float("inf"), gl.float32, s_rows)
    total = gl.zeros([M], gl.float32, s_rows)
    acc = gl.zeros([M, RANK], gl.float32, acc_layout)
    for tile in range(tiles):
        acc, m, total = _attend_tile(
            acc, m, total, buffers, low, position, base + tile, first_tile + tile, length,
            tile + 1 == tiles, scale_log2, rings, P,
        )  # fmt: skip
    total = gl.where(total > 0, total, 1.0)
    lse = gl.convert_layout(m + gl.log2(total), acc_rows)
    return acc * gl.convert_layout(1.0 / total, acc_rows)[:, None], lse


def fits(q_THC: Tensor, plane: LatentPlane) -> bool:
    """Whether the kernels here can take a layer; never depends on the step."""
    return (
        plane.is_plain
        and q_THC.dtype in (torch.bfloat16, torch.float16)
        and plane.numbers.dtype == q_THC.dtype
        and plane.rank in (128, 256, 512)
        and plane.rope_size == ROTATED.value
        and plane.block_size in (16, 32, 64)
        and plane.numbers.data_ptr() % 16 == 0
        and has_wgmma(q_THC.device)
    )


def described(plane: LatentPlane) -> TensorDescriptor:
    """Returns the pages as TMA takes them, by ROTATED columns."""
    page = [1, plane.block_size, ROTATED.value]
    return TensorDescriptor.from_tensor(plane.numbers, page, PAGE_LAYOUT)
