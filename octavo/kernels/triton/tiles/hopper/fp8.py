"""Products of FP8 with FP8 on Hopper: tiles come by TMA into a ring, warpgroups multiply them.

Called by the kernels of experts and of dense products. A piece of work is a run of rows of x and
the rows of two tiles of weights: those of gate and up, or neighbours. Where rows of x are few the
weights are the rows of the tensor cores' product, so that nothing of it is empty.

Shape legend: R rows of x, N rows of weights, K columns of both.
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
from triton.language.extra.cuda import gdc_wait

TILE = gl.constexpr(128)
"""Rows of a tile of weights, and columns of all tiles: what shares a scale."""
HALF = gl.constexpr(64)
"""Rows of x of a warpgroup, where rows are many."""
TILE_LAYOUT = gl.NVMMASharedLayout(128, 8, 2)


@gluon.jit
def make_rings(dtype: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, S: gl.constexpr):
    """Returns (x, first, second, full, empty): shared memory for S steps, with their barriers."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    if IS_FEW:
        x = gl.allocate_shared_memory(dtype, [S, ROWS, TILE], tile)
    else:
        x = gl.allocate_shared_memory(dtype, [S * ROWS // HALF, HALF, TILE], tile)
    first = gl.allocate_shared_memory(dtype, [S, TILE, TILE], tile)
    second = gl.allocate_shared_memory(dtype, [S, TILE, TILE], tile)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if IS_FEW else ROWS // HALF)
    fence_async_shared()
    return x, first, second, full, empty


@gluon.jit
def _bring_weights(first, second, first_row, second_row, step, slot, rings):
    """Asks for a step's tiles of weights, and says how much all of the step's will be."""
    x_ring, first_ring, second_ring, full, _ = rings
    BOXES: gl.constexpr = x_ring.shape[0] // first_ring.shape[0]
    BYTES: gl.constexpr = (x_ring.shape[1] * BOXES + 2 * TILE) * TILE
    barrier = full.index(slot)
    mbarrier.expect(barrier, BYTES)
    at = [first_row, step * TILE]
    tma.async_copy_global_to_shared(first, at, barrier, first_ring.index(slot))
    at = [second_row, step * TILE]
    tma.async_copy_global_to_shared(second, at, barrier, second_ring.index(slot))


@gluon.jit
def _bring_x(x, row, step, slot, rings):
    """Asks for a step's rows of x."""
    x_ring, first_ring, _, full, _ = rings
    BOXES: gl.constexpr = x_ring.shape[0] // first_ring.shape[0]
    for box in gl.static_range(BOXES):
        at = [row + box * x_ring.shape[1], step * TILE]
        to = x_ring.index(slot * BOXES + box)
        tma.async_copy_global_to_shared(x, at, full.index(slot), to)


@gluon.jit
def bring(x, first, second, row, first_row, second_row, steps, base, rings, HAS_TURN: gl.constexpr):
    """Brings the tiles of a piece; `base`: steps brought before. At first there are weights, and
    then, where it HAS_TURN, this kernel's turn."""
    _, first_ring, _, _, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    ahead = base * 0
    if base == 0:
        ahead = gl.minimum(steps, S)
        for step in range(ahead):
            _bring_weights(first, second, first_row, second_row, step, step, rings)
        if HAS_TURN:
            gdc_wait()
        for step in range(ahead):
            _bring_x(x, row, step, step, rings)
    for step in range(ahead, steps):
        slot = (base + step) % S
        mbarrier.wait(empty.index(slot), (base + step) // S & 1 ^ 1)
        _bring_weights(first, second, first_row, second_row, step, slot, rings)
        _bring_x(x, row, step, slot, rings)


@gluon.jit
def multiply_many(HALF_OF: gl.constexpr, scales, steps, base, rings, BY_BLOCK: gl.constexpr):
    """Returns x @ first.T and x @ second.T [HALF, TILE] of a warpgroup's rows.

    BY_BLOCK: `scales` is (pointers to those of x by row, their stride; of first, of second, and
    their stride): every step's product is scaled; else by nobody.
    """
    x_ring, first_ring, second_ring, full, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    BOXES: gl.constexpr = x_ring.shape[0] // S
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    of_first = gl.zeros([HALF, TILE], gl.float32, L)
    of_second = gl.zeros([HALF, TILE], gl.float32, L)
    if BY_BLOCK:
        x_at, first_at, second_at, x_stride, stride = scales
        x_scale, f_scale, s_scale = gl.load(x_at), gl.load(first_at), gl.load(second_at)
    for step in range(steps):
        slot = (base + step) % S
        if BY_BLOCK:  # The next step's scales travel while this one is multiplied.
            further = gl.minimum(step + 1, steps - 1)
            next_x = gl.load(x_at + further * x_stride)
            next_f = gl.load(first_at + further * stride)
            next_s = gl.load(second_at + further * stride)
        mbarrier.wait(full.index(slot), (base + step) // S & 1)
        x = x_ring.index(slot * BOXES + HALF_OF)
        first = first_ring.index(slot).permute((1, 0))
        second = second_ring.index(slot).permute((1, 0))
        if BY_BLOCK:
            now = gl.zeros([HALF, TILE], gl.float32, L)
            now = warpgroup_mma(x, first, now, use_acc=False, is_async=True)
            now = warpgroup_mma_wait(0, deps=(now,))
            of_first += now * (x_scale * f_scale)[:, None]
            then = gl.zeros([HALF, TILE], gl.float32, L)
            then = warpgroup_mma(x, second, then, use_acc=False, is_async=True)
            then = warpgroup_mma_wait(0, deps=(then,))
            mbarrier.arrive(empty.index(slot))
            of_second += then * (x_scale * s_scale)[:, None]
            x_scale, f_scale, s_scale = next_x, next_f, next_s
        else:
            of_first = warpgroup_mma(x, first, of_first, is_async=True)
            of_second = warpgroup_mma(x, second, of_second, is_async=True)
            of_first, of_second = warpgroup_mma_wait(0, deps=(of_first, of_second))
            mbarrier.arrive(empty.index(slot))
    return of_first, of_second


@gluon.jit
def multiply_few(ROWS: gl.constexpr, scales, steps, base, rings, BY_BLOCK: gl.constexpr):
    """Returns first @ x.T and second @ x.T [TILE, ROWS]; `scales` as above, those of weights by
    their rows."""
    x_ring, first_ring, second_ring, full, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    of_first = gl.zeros([TILE, ROWS], gl.float32, L)
    of_second = gl.zeros([TILE, ROWS], gl.float32, L)
    if BY_BLOCK:
        x_at, first_at, second_at, x_stride, stride = scales
        x_scale, f_scale, s_scale = gl.load(x_at), gl.load(first_at), gl.load(second_at)
    for step in range(steps):
        slot = (base + step) % S
        if BY_BLOCK:
            further = gl.minimum(step + 1, steps - 1)
            next_x = gl.load(x_at + further * x_stride)
            next_f = gl.load(first_at + further * stride)
            next_s = gl.load(second_at + further * stride)
        mbarrier.wait(full.index(slot), (base + step) // S & 1)
        x = x_ring.index(slot).permute((1, 0))
        first, second = first_ring.index(slot), second_ring.index(slot)
        if BY_BLOCK:
            now = gl.zeros([TILE, ROWS], gl.float32, L)
            then = gl.zeros([TILE, ROWS], gl.float32, L)
            now = warpgroup_mma(first, x, now, use_acc=False, is_async=True)
            then = warpgroup_mma(second, x, then, use_acc=False, is_async=True)
            now, then = warpgroup_mma_wait(0, deps=(now, then))
            mbarrier.arrive(empty.index(slot))
            of_first += now * (f_scale[:, None] * x_scale[None, :])
            of_second += then * (s_scale[:, None] * x_scale[None, :])
            x_scale, f_scale, s_scale = next_x, next_f, next_s
        else:
            of_first = warpgroup_mma(first, x, of_first, is_async=True)
            of_second = warpgroup_mma(second, x, of_second, is_async=True)
            of_first, of_second = warpgroup_mma_wait(0, deps=(of_first, of_second))
            mbarrier.arrive(empty.index(slot))
    return of_first, of_second
