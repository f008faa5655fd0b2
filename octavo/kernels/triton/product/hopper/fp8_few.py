"""Dense products of FP8 weights with FP8 activations on Hopper, few rows of x.

Called by `choose.py` where `fits` says so and no row is to be invariant. As `fp8.py`, but weights
are the rows of the tensor cores' product, and all of a program's codes are asked for before its
turn, where its ring has room for them.

Shape legend: T tokens, M columns of the weight, N rows, G blocks of columns.
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
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.planes import Planes
from octavo.kernels.triton.launching.chip import cdiv, has_wgmma
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.launching.tickets import room_for_splits
from octavo.kernels.triton.product.packed_shapes import FewShape
from octavo.kernels.triton.small.quantize import Fp8Rows
from octavo.kernels.triton.tiles.hopper.fp8 import HALF, TILE, sums_layout, tiles_of
from octavo.kernels.triton.tiles.hopper.splits import store_product
from octavo.planes import PlaneLayout

MOST_STEPS = 128
"""Tiles of a row whose scales there is room for."""


@gluon.jit
def _bring(source, row, step, ring, full, slot):
    tma.async_copy_global_to_shared(source, [row, step * TILE], full.index(slot), ring.index(slot))


@launchable
@gluon.jit(do_not_specialize=["num_tokens"])
def fp8_few_kernel(
    x,
    weight,
    x_scales_GT,
    scales,
    bias_N,
    out_TN,
    sums_STN,
    tickets,
    num_tokens,
    num_rows,
    scale_stride,
    out_stride,
    TOKENS: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    BY_BLOCK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m], times their scales (+ bias[n]).

    x descriptor of e4m3 [T, M] in boxes [TOKENS, TILE], weight of [N, M] in boxes [HALF, TILE];
    x_scales float32 [G, T]; scales of the weight: one a row, or BY_BLOCK, by columns,
    `scale_stride` apart, which all rows of a program share. out_TN [T, N] with a row stride, bias_N
    [N] any float. A program sums STEPS tiles; SPLITS as in `sum_of_splits`, sums_STN and tickets
    for it.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    SUMS: gl.constexpr = sums_layout(TOKENS, True)
    ROOM: gl.constexpr = (
        16 if STEPS <= 16 else (32 if STEPS <= 32 else (64 if STEPS <= 64 else 128))
    )
    blocks = (num_tokens + TOKENS - 1) // TOKENS
    first_token = gl.program_id(0) % blocks * TOKENS
    first_row = gl.program_id(0) // blocks * HALF
    begin = gl.program_id(1) * STEPS
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, HALF, TILE], tile)
    rows = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, TILE], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    BYTES: gl.constexpr = (HALF + TOKENS) * TILE
    AHEAD: gl.constexpr = STEPS if STEPS < STAGES else STAGES
    for step in range(AHEAD):
        mbarrier.expect(full.index(step), BYTES)
        _bring(weight, first_row, begin + step, weights, full, step)
    of_steps: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    step = gl.arange(0, ROOM, gl.SliceLayout(1, of_steps))
    step = gl.minimum(step, STEPS - 1) + begin
    of_weight = gl.full([ROOM], 1.0, gl.float32, gl.SliceLayout(1, of_steps))
    if BY_BLOCK:
        of_weight = gl.load(scales + first_row + step.to(gl.int64) * scale_stride)
    if OVERLAP:
        gdc_wait()
    for one in range(AHEAD):
        _bring(x, first_token, begin + one, rows, full, one)
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, of_steps))
    token = gl.minimum(token, num_tokens - 1)
    found = gl.load(x_scales_GT + (step[:, None] * num_tokens + token[None, :]))
    found = found * of_weight[:, None]
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    factors = gl.allocate_shared_memory(gl.float32, [ROOM, TOKENS], flat)
    factors.store(found)
    factors = factors._reinterpret(gl.float32, [ROOM, 1, TOKENS], flat)
    gl.thread_barrier()
    total = gl.zeros([HALF, TOKENS], gl.float32, SUMS)
    last = gl.zeros_like(total)
    factor = gl.zeros([1, TOKENS], gl.float32, SUMS)
    for one in range(STEPS):
        slot = one % STAGES
        mbarrier.wait(full.index(slot), one // STAGES & 1)
        now = warpgroup_mma(
            weights.index(slot),
            rows.index(slot).permute((1, 0)),
            gl.zeros_like(total),
            use_acc=False,
            is_async=True,
        )
        total += last * factor
        factor = factors.index(one).load(SUMS)
        last = warpgroup_mma_wait(0, deps=(now,))
        if STEPS > STAGES:
            ahead = one + STAGES
            gl.thread_barrier()  # All warps have read the slot.
            if ahead < STEPS:
                mbarrier.expect(full.index(slot), BYTES)
                _bring(weight, first_row, begin + ahead, weights, full, slot)
                _bring(x, first_token, begin + ahead, rows, full, slot)
    total += last * factor
    store_product(
        *(total, out_TN, bias_N, scales, sums_STN, tickets, first_row, first_token, num_rows),
        *(num_tokens, out_stride, SPLITS, not BY_BLOCK, HAS_BIAS),
    )


def fits(x_TM: Tensor, planes: Planes, layout: PlaneLayout, *, is_by_tile: bool) -> bool:
    """Whether the kernel here can multiply x of a dtype and device with a weight; never depends on
    how many rows x has."""
    return (
        layout.values == "e4m3"
        and (is_by_tile or layout.group == 0)
        and len(planes.codes) % HALF.value == 0
        and layout.padded(x_TM.shape[1]) % TILE.value == 0
        and x_TM.shape[1] <= MOST_STEPS * TILE.value
        and x_TM.dtype in (torch.bfloat16, torch.float16)
        and has_wgmma(x_TM.device)
    )


def fp8_few_product(
    rows: Fp8Rows,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: FewShape,
    tickets: Tensor | None = None,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided; `rows`: x rounded, with
    a scale for each TILE columns. `tickets`: see `make_tickets`; for shapes that split the sum."""
    num_tokens, padded = rows.numbers.shape
    num_rows, steps = len(planes.codes), padded // TILE.value
    assert out_TN.shape == (num_tokens, num_rows)
    assert steps % shape.splits == 0
    if num_tokens == 0:
        return
    grid = cdiv(num_tokens, shape.tokens) * (num_rows // HALF.value)
    parts = room_for_splits(rows.scales, shape.splits, out_TN.shape, grid, tickets)
    fp8_few_kernel[(grid, shape.splits)](
        tiles_of(rows.numbers, shape.tokens),
        tiles_of(planes.codes, HALF.value),
        rows.scales,
        planes.scales,
        rows.scales if bias_N is None else bias_N,
        out_TN,
        *parts,
        num_tokens,
        num_rows,
        planes.scales.stride(1),
        out_TN.stride(0),
        TOKENS=shape.tokens,
        STEPS=steps // shape.splits,
        STAGES=shape.stages,
        SPLITS=shape.splits,
        BY_BLOCK=layout.group > 0,
        HAS_BIAS=bias_N is not None,
        num_warps=4,
        **launch_options(out_TN.device),
    )
