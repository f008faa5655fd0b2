"""Dense products of 16-bit weights with few rows of x on Hopper.

Called by `choose.py` where `fits` says so and no row is to be invariant. As `fp8_few.py`: weights
are the rows of the tensor cores' product, tiles come by TMA, and as many of a program's weights as
its ring has room for are asked for before its turn.

Shape legend: T tokens, M columns of the weight, N rows.
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

from octavo.kernels.triton.launching.chip import cdiv, has_wgmma
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.launching.tickets import room_for_splits
from octavo.kernels.triton.product.packed_shapes import FewShape
from octavo.kernels.triton.tiles.hopper.splits import store_product

COLUMNS = gl.constexpr(64)
"""Of a tile."""
ROWS = gl.constexpr(64)
"""Of the weight, in a program."""
_TILE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


@gluon.jit
def _bring(source, row, step, ring, full, slot):
    at = [row, step * COLUMNS]
    tma.async_copy_global_to_shared(source, at, full.index(slot), ring.index(slot))


@launchable
@gluon.jit(do_not_specialize=["num_tokens"])
def few_kernel(
    x,
    weight,
    bias_N,
    out_TN,
    sums_STN,
    tickets,
    num_tokens,
    num_rows,
    out_stride,
    TOKENS: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m] (+ bias[n]).

    x descriptor of [T, M] in boxes [TOKENS, COLUMNS], weight of [N, M] in boxes [ROWS, COLUMNS];
    out_TN [T, N] with a row stride, bias_N [N] any float. A program sums STEPS tiles, those beyond
    M are zeros; SPLITS as in `sum_of_splits`, sums_STN and tickets for it.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    blocks = (num_tokens + TOKENS - 1) // TOKENS
    first_token = gl.program_id(0) % blocks * TOKENS
    first_row = gl.program_id(0) // blocks * ROWS
    begin = gl.program_id(1) * STEPS
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, ROWS, COLUMNS], tile)
    rows = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, COLUMNS], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    BYTES: gl.constexpr = (ROWS + TOKENS) * COLUMNS * 2
    AHEAD: gl.constexpr = STEPS if STEPS < STAGES else STAGES
    for step in range(AHEAD):
        mbarrier.expect(full.index(step), BYTES)
        _bring(weight, first_row, begin + step, weights, full, step)
    if OVERLAP:
        gdc_wait()
    for step in range(AHEAD):
        _bring(x, first_token, begin + step, rows, full, step)
    total = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
    for step in range(STEPS):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        total = warpgroup_mma(
            weights.index(slot), rows.index(slot).permute((1, 0)), total, is_async=True
        )
        total = warpgroup_mma_wait(1, deps=(total,))
        if STEPS > STAGES:
            # The slot of the step before is free once all warps have waited for it.
            gl.thread_barrier()
            ahead = step - 1 + STAGES
            if (step > 0) & (ahead < STEPS):
                free = (step - 1) % STAGES
                mbarrier.expect(full.index(free), BYTES)
                _bring(weight, first_row, begin + ahead, weights, full, free)
                _bring(x, first_token, begin + ahead, rows, full, free)
    total = warpgroup_mma_wait(0, deps=(total,))
    store_product(
        *(total, out_TN, bias_N, bias_N, sums_STN, tickets, first_row, first_token, num_rows),
        *(num_tokens, out_stride, SPLITS, False, HAS_BIAS),
    )


def fits(x_TM: Tensor, weight_NM: Tensor) -> bool:
    """Whether the kernel here can multiply x of a dtype and device with a weight; never depends on
    how many rows x has."""
    num_rows, length = weight_NM.shape
    return (
        x_TM.dtype == weight_NM.dtype
        and x_TM.dtype in (torch.bfloat16, torch.float16)
        and num_rows % ROWS.value == length % COLUMNS.value == 0
        and weight_NM.stride(1) == 1
        and weight_NM.stride(0) % 8 == 0
        and weight_NM.data_ptr() % 16 == x_TM.data_ptr() % 16 == 0
        and has_wgmma(x_TM.device)
    )


def few_product(
    x_TM: Tensor,
    weight_NM: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: FewShape,
    tickets: Tensor | None = None,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided. `tickets`: see
    `make_tickets`; for shapes that split the sum."""
    num_tokens, length = x_TM.shape
    num_rows, steps = len(weight_NM), length // COLUMNS.value
    assert out_TN.shape == (num_tokens, num_rows)
    assert x_TM.is_contiguous()
    if num_tokens == 0:
        return
    grid = cdiv(num_tokens, shape.tokens) * (num_rows // ROWS.value)
    parts = room_for_splits(x_TM, shape.splits, out_TN.shape, grid, tickets)
    few_kernel[(grid, shape.splits)](
        TensorDescriptor.from_tensor(x_TM, [shape.tokens, COLUMNS.value], _TILE_LAYOUT),
        TensorDescriptor.from_tensor(weight_NM, [ROWS.value, COLUMNS.value], _TILE_LAYOUT),
        x_TM if bias_N is None else bias_N,
        out_TN,
        *parts,
        num_tokens,
        num_rows,
        out_TN.stride(0),
        TOKENS=shape.tokens,
        STEPS=cdiv(steps, shape.splits),
        STAGES=shape.stages,
        SPLITS=shape.splits,
        HAS_BIAS=bias_N is not None,
        num_warps=4,
        **launch_options(out_TN.device),
    )
