"""Products of FP8 with FP8 on Hopper: tiles come by TMA into a ring, warpgroups multiply them.

Called by the kernels of experts and of dense products. A piece of work is a run of rows of x and
the rows of two tiles of weights: those of gate and up, or neighbours. Where rows of x are few the
weights are the rows of the tensor cores' product (IS_FEW), so that nothing of it is empty.

Scales of weights go by rows, or by blocks of columns: then one counts for all rows of a tile, as
FP8 is published (BY_TILE), or each row has its own.

Shape legend: R rows of x, N rows of weights, K columns of both.
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
from triton.language.extra.cuda import gdc_wait

TILE = gl.constexpr(128)
"""Rows of a tile of weights, and columns of all tiles: what shares a scale."""
HALF = gl.constexpr(64)
"""Rows of x of a warpgroup, where rows are many."""
TOGETHER = gl.constexpr(16)
"""Blocks of rows of x that go through the tiles of weights side by side."""
PRODUCER_REGISTERS = 40
"""Of the warp that asks for tiles."""
CONSUMER_REGISTERS = gl.constexpr(240)
TILE_LAYOUT = gl.NVMMASharedLayout(128, 8, 2)


def tiles_of(numbers: Tensor, rows: int = 128) -> TensorDescriptor:
    """Returns e4m3 [.., K], or codes of it, as kernels here bring it: boxes of so many rows."""
    fp8 = numbers.view(torch.float8_e4m3fn)
    return TensorDescriptor.from_tensor(fp8, [rows, TILE.value], TILE_LAYOUT)


@gluon.jit
def make_rings(dtype: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, S: gl.constexpr):
    """Returns (x, first, second, full, empty): shared memory for S steps, with their barriers."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    BOX: gl.constexpr = ROWS if IS_FEW else HALF
    x = gl.allocate_shared_memory(dtype, [S * ROWS // BOX, BOX, TILE], tile)
    first = gl.allocate_shared_memory(dtype, [S, TILE, TILE], tile)
    second = gl.allocate_shared_memory(dtype, [S, TILE, TILE], tile)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ROWS // BOX)
    fence_async_shared()
    return x, first, second, full, empty


@gluon.jit
def place_of(unit, blocks, columns):
    """Returns which block of rows of x and which column of tiles a unit of work is. Some blocks go
    through the columns together: weights that no cache holds are read once for them all."""
    first = unit // (TOGETHER * columns) * TOGETHER
    count = gl.minimum(TOGETHER, blocks - first)
    within = unit - first * columns
    return first + within % count, within // count


@gluon.jit
def _in_boxes(ring, BOX: gl.constexpr):
    """Returns a ring of tiles as boxes of so many rows."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    COUNT: gl.constexpr = ring.shape[0] * (TILE // BOX)
    return ring._reinterpret(ring.dtype, [COUNT, BOX, TILE], tile)


@gluon.jit
def _bring_weights(
    first, second, first_row, second_row, step, base, rings, COUNT: gl.constexpr
):  # fmt: skip
    """Asks for the weights' tiles of COUNT steps, and says how much all of a step's will be: boxes
    of the same rows one after the other, since memory has them in one piece."""
    x_ring, first_ring, second_ring, full, _ = rings
    S: gl.constexpr = first_ring.shape[0]
    BOXES: gl.constexpr = x_ring.shape[0] // S
    BYTES: gl.constexpr = (x_ring.shape[1] * BOXES + 2 * TILE) * TILE
    BOX: gl.constexpr = first.block_shape[0]
    PIECES: gl.constexpr = TILE // BOX
    for one in gl.static_range(COUNT):
        mbarrier.expect(full.index((base + step + one) % S), BYTES)
    of_first, of_second = _in_boxes(first_ring, BOX), _in_boxes(second_ring, BOX)
    for piece in range(PIECES):
        for one in gl.static_range(COUNT):
            slot = (base + step + one) % S
            at = [first_row + piece * BOX, (step + one) * TILE]
            to = of_first.index(slot * PIECES + piece)
            tma.async_copy_global_to_shared(first, at, full.index(slot), to)
    for piece in range(PIECES):
        for one in gl.static_range(COUNT):
            slot = (base + step + one) % S
            at = [second_row + piece * BOX, (step + one) * TILE]
            to = of_second.index(slot * PIECES + piece)
            tma.async_copy_global_to_shared(second, at, full.index(slot), to)


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
def _bring_steps(
    x, first, second, row, first_row, second_row, step, base, rings, COUNT: gl.constexpr
):  # fmt: skip
    """Asks for all of COUNT steps, as soon as there is room."""
    _, first_ring, _, _, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    for one in gl.static_range(COUNT):
        number = base + step + one
        mbarrier.wait(empty.index(number % S), number // S & 1 ^ 1)
    _bring_weights(first, second, first_row, second_row, step, base, rings, COUNT)
    for one in gl.static_range(COUNT):
        _bring_x(x, row, step + one, (base + step + one) % S, rings)


@gluon.jit
def bring(
    x, first, second, row, first_row, second_row, steps, base, rings, HAS_TURN: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """Brings the tiles of a piece, COUNT steps at a time; `base`: steps brought before. At first
    there are weights, and then, where it HAS_TURN, this kernel's turn."""
    _, first_ring, _, _, _ = rings
    S: gl.constexpr = first_ring.shape[0]
    ahead = base * 0
    if base == 0:
        ahead = gl.minimum(steps, S // COUNT * COUNT) // COUNT * COUNT
        for step in range(0, ahead, COUNT):
            _bring_weights(first, second, first_row, second_row, step, base, rings, COUNT)
        if HAS_TURN:
            gdc_wait()
        for step in range(ahead):
            _bring_x(x, row, step, step, rings)
    whole = steps // COUNT * COUNT
    for step in range(ahead, whole, COUNT):
        _bring_steps(x, first, second, row, first_row, second_row, step, base, rings, COUNT)
    for step in range(whole, steps):
        _bring_steps(x, first, second, row, first_row, second_row, step, base, rings, 1)


@gluon.constexpr_function
def sums_layout(rows: int, is_few: bool) -> gl.NVMMADistributedLayout:
    """Returns the layout of sums [HALF, TILE]; or IS_FEW, [TILE, rows]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows if is_few else TILE.value, 32])


@gluon.jit
def _begun(x, weights, total, USE_TOTAL: gl.constexpr, IS_FEW: gl.constexpr):
    """Returns what will be total, or 0, and x @ weights.T; IS_FEW: weights @ x.T."""
    if IS_FEW:
        return warpgroup_mma(weights, x.permute((1, 0)), total, use_acc=USE_TOTAL, is_async=True)
    else:
        return warpgroup_mma(x, weights.permute((1, 0)), total, use_acc=USE_TOTAL, is_async=True)


@gluon.jit
def _factors(x_scale, weight_scale, IS_FEW: gl.constexpr):
    """Returns what sums are multiplied with: the scales of rows of x times those of weights, one
    number or one for each of their rows."""
    WEIGHTS: gl.constexpr = 0 if IS_FEW else 1
    if len(weight_scale.shape) == 0:
        return gl.expand_dims(x_scale * weight_scale, WEIGHTS)
    else:
        return gl.expand_dims(x_scale, WEIGHTS) * gl.expand_dims(weight_scale, 1 - WEIGHTS)


@gluon.jit
def _multiply(
    HALF_OF: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, steps, base, rings
):  # fmt: skip
    """Returns the products with both tiles of weights, scaled by nobody. A step is begun before the
    last one is done."""
    x_ring, first_ring, second_ring, full, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    BOXES: gl.constexpr = x_ring.shape[0] // S
    SHAPE: gl.constexpr = [TILE, ROWS] if IS_FEW else [HALF, TILE]
    of_first = gl.zeros(SHAPE, gl.float32, sums_layout(ROWS, IS_FEW))
    of_second = gl.zeros_like(of_first)
    for step in range(steps):
        slot = (base + step) % S
        mbarrier.wait(full.index(slot), (base + step) // S & 1)
        x = x_ring.index(slot * BOXES + HALF_OF)
        of_first = _begun(x, first_ring.index(slot), of_first, True, IS_FEW)
        of_second = _begun(x, second_ring.index(slot), of_second, True, IS_FEW)
        of_first, of_second = warpgroup_mma_wait(2, deps=(of_first, of_second))
        if step > 0:
            mbarrier.arrive(empty.index((base + step - 1) % S))
    of_first, of_second = warpgroup_mma_wait(0, deps=(of_first, of_second))
    mbarrier.arrive(empty.index((base + steps - 1) % S))
    return of_first, of_second


@gluon.jit
def _multiply_by_block(
    HALF_OF: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, scales, steps, base, rings
):  # fmt: skip
    """Returns the products with both tiles of weights, of which every step's is scaled.

    `scales`: pointers to those of x by row, of first and of second, and how far those of a step are
    from the next one's, of x and of weights.
    """
    x_ring, first_ring, second_ring, full, empty = rings
    S: gl.constexpr = first_ring.shape[0]
    BOXES: gl.constexpr = x_ring.shape[0] // S
    SHAPE: gl.constexpr = [TILE, ROWS] if IS_FEW else [HALF, TILE]
    of_first = gl.zeros(SHAPE, gl.float32, sums_layout(ROWS, IS_FEW))
    of_second = gl.zeros_like(of_first)
    x_at, first_at, second_at, x_stride, stride = scales
    x_scale, f_scale, s_scale = gl.load(x_at), gl.load(first_at), gl.load(second_at)
    for step in range(steps):
        slot = (base + step) % S
        # The next step's scales travel while this one is multiplied.
        further = gl.minimum(step + 1, steps - 1)
        next_x = gl.load(x_at + further * x_stride)
        next_f = gl.load(first_at + further * stride)
        next_s = gl.load(second_at + further * stride)
        mbarrier.wait(full.index(slot), (base + step) // S & 1)
        x = x_ring.index(slot * BOXES + HALF_OF)
        now = _begun(x, first_ring.index(slot), gl.zeros_like(of_first), False, IS_FEW)
        if IS_FEW:  # Both fit the registers at once.
            then = _begun(x, second_ring.index(slot), gl.zeros_like(of_first), False, IS_FEW)
            now, then = warpgroup_mma_wait(0, deps=(now, then))
            mbarrier.arrive(empty.index(slot))
            of_first += now * _factors(x_scale, f_scale, IS_FEW)
        else:
            now = warpgroup_mma_wait(0, deps=(now,))
            of_first += now * _factors(x_scale, f_scale, IS_FEW)
            # In the registers of the last one: there are no more.
            then = _begun(x, second_ring.index(slot), now, False, IS_FEW)
            then = warpgroup_mma_wait(0, deps=(then,))
            mbarrier.arrive(empty.index(slot))
        of_second += then * _factors(x_scale, s_scale, IS_FEW)
        x_scale, f_scale, s_scale = next_x, next_f, next_s
    return of_first, of_second


@gluon.jit
def scaled_sums(
    HALF_OF: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, BY_BLOCK: gl.constexpr,
    BY_TILE: gl.constexpr, row, num_places, scales, steps, base, rings,
):  # fmt: skip
    """Returns x @ first.T and x @ second.T [HALF, TILE] of a warpgroup's rows; IS_FEW: first @ x.T
    and second @ x.T [TILE, ROWS].

    row: which rows of x, of num_places, [HALF or ROWS] along the sums. `scales`: pointers to those
    of x [G or 1, num_places], to those of the first row of first and of second, and how far columns
    of the latter are apart. BY_BLOCK: they go by steps; BY_TILE: and are one for a tile of weights,
    as they must be for many rows.
    """
    WEIGHTS: gl.constexpr = 0 if IS_FEW else 1
    n = gl.arange(0, TILE, gl.SliceLayout(1 - WEIGHTS, row.type.layout.parent))
    x_scales, first_at, second_at, stride = scales
    x_at = x_scales + gl.minimum(row, num_places - 1)
    if BY_BLOCK:
        gl.static_assert(IS_FEW or BY_TILE)
        if not BY_TILE:
            first_at += n
            second_at += n
        by_step = x_at, first_at, second_at, gl.to_tensor(num_places).to(gl.int64), stride
        one, two = _multiply_by_block(HALF_OF, ROWS, IS_FEW, by_step, steps, base, rings)
    else:
        one, two = _multiply(HALF_OF, ROWS, IS_FEW, steps, base, rings)
        one *= _factors(gl.load(x_at), gl.load(first_at + n), IS_FEW)
        two *= _factors(gl.load(x_at), gl.load(second_at + n), IS_FEW)
    return one, two
