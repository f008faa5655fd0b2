"""Dense products of FP8 weights with FP8 activations on Hopper, many rows of x.

Called by `choose.py` where `fits` says so and no row is to be invariant. Rows of x are rounded
before, each with scales of its own. Whose scales go by blocks must have one for 128 rows too, as
published ones do.

Shape legend: T tokens, M columns of the weight, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.planes import Planes
from octavo.kernels.triton.launching.chip import cdiv, has_wgmma, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.small.quantize import Fp8Rows
from octavo.kernels.triton.tiles.hopper.fp8 import (
    CONSUMER_REGISTERS,
    HALF,
    PRODUCER_REGISTERS,
    TILE,
    bring,
    make_rings,
    place_of,
    scaled_sums,
    sums_layout,
    tiles_of,
)
from octavo.kernels.triton.tiles.hopper.fp8_ends import store_rows, wide_layout
from octavo.planes import PlaneLayout

ROWS = gl.constexpr(2 * HALF.value)
"""Of x, in a piece of work."""
STAGES = 4


@gluon.jit
def _bring_all(x, weight, columns, steps, blocks, rings, OVERLAP: gl.constexpr):
    """Keeps the rings full."""
    base = blocks * 0
    for unit in range(gl.program_id(0), blocks * columns, gl.num_programs(0)):
        block, column = place_of(unit, blocks, columns)
        rows = block * ROWS, column * (2 * TILE), column * (2 * TILE) + TILE
        bring(x, weight, weight, *rows, steps, base, rings, OVERLAP, 1)
        base += steps
    if OVERLAP:
        gdc_wait()


@gluon.jit
def _multiply_half(
    HALF_OF: gl.constexpr, BY_BLOCK: gl.constexpr, HAS_BIAS: gl.constexpr, OVERLAP: gl.constexpr,
    x_scales, scales, bias, out, num_tokens, num_rows, scale_stride, out_stride, columns, steps,
    blocks, rings,
):  # fmt: skip
    """Multiplies half of the rows of every piece."""
    SUMS: gl.constexpr = sums_layout(ROWS, False)
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    base = blocks * 0
    for unit in range(gl.program_id(0), blocks * columns, gl.num_programs(0)):
        block, column = place_of(unit, blocks, columns)
        start = block * ROWS + HALF_OF * HALF
        row = start + gl.arange(0, HALF, gl.SliceLayout(1, SUMS))
        column *= 2 * TILE
        # Where rows end with the first tile there is no second: it is brought as zeros.
        second = gl.minimum(column + TILE, num_rows - TILE)
        one, two = scaled_sums(
            *(HALF_OF, ROWS, False, BY_BLOCK, True, row, num_tokens),
            *((x_scales, scales + column, scales + second, scale_stride), steps, base, rings),
        )
        base += steps
        if HAS_BIAS:
            n = gl.arange(0, TILE, gl.SliceLayout(0, SUMS))
            one += gl.load(bias + (column + n)).to(gl.float32)[None, :]
            two += gl.load(bias + (second + n)).to(gl.float32)[None, :]
        place = start + gl.arange(0, HALF, gl.SliceLayout(1, wide_layout(False)))
        is_token = place < num_tokens
        made, then = one.to(out.dtype.element_ty), two.to(out.dtype.element_ty)
        store_rows(out, made, place, is_token, out_stride, column, False)
        if column + TILE < num_rows:
            store_rows(out, then, place, is_token, out_stride, column + TILE, False)


@launchable
@gluon.jit(do_not_specialize=["num_tokens", "steps", "columns"])
def fp8_rows_kernel(
    x,
    weight,
    x_scales,
    scales,
    bias_N,
    out_TN,
    num_tokens,
    num_rows,
    scale_stride,
    out_stride,
    columns,
    steps,
    BY_BLOCK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m], times their scales (+ bias[n]).

    x descriptor of e4m3 [T, K] in boxes [HALF, TILE], weight of [N, K] in boxes [TILE, TILE];
    x_scales [G or 1, T], scales of the weight by columns, `scale_stride` apart; out_TN [T, N] with
    a row stride, bias_N [N] any float. `columns`: pairs of tiles in N. One warp asks for tiles, two
    warpgroups multiply.
    """
    rings = make_rings(x.dtype, ROWS, False, STAGES)
    blocks = (num_tokens + ROWS - 1) // ROWS
    rest = (x_scales, scales, bias_N, out_TN, num_tokens, num_rows, scale_stride, out_stride,
            columns, steps, blocks, rings)  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply_half, (0, BY_BLOCK, HAS_BIAS, OVERLAP) + rest),
            (_multiply_half, (1, BY_BLOCK, HAS_BIAS, OVERLAP) + rest),
            (_bring_all, (x, weight, columns, steps, blocks, rings, OVERLAP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, REGISTERS],
    )


def fits(x_TM: Tensor, planes: Planes, layout: PlaneLayout) -> bool:
    """Whether the kernel here can multiply x of a dtype and device with a weight, whose scales are
    shared by tiles where they go by blocks; never depends on how many rows x has."""
    return (
        layout.values == "e4m3"
        and len(planes.codes) % TILE.value == 0
        and x_TM.dtype in (torch.bfloat16, torch.float16)
        and has_wgmma(x_TM.device)
    )


def hopper_fp8_product_of(
    rows: Fp8Rows, planes: Planes, layout: PlaneLayout, bias_N: Tensor | None, out_TN: Tensor
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided; `rows`: x rounded."""
    num_tokens, padded = rows.numbers.shape
    num_rows = len(planes.codes)
    assert out_TN.shape == (num_tokens, num_rows)
    if num_tokens == 0:
        return
    columns = cdiv(num_rows, 2 * TILE.value)
    units = cdiv(num_tokens, ROWS.value) * columns
    fp8_rows_kernel[(min(units, num_processors(out_TN.device)),)](
        tiles_of(rows.numbers, HALF.value),
        tiles_of(planes.codes),
        rows.scales,
        planes.scales,
        rows.scales if bias_N is None else bias_N,
        out_TN,
        num_tokens,
        num_rows,
        planes.scales.stride(1),
        out_TN.stride(0),
        columns,
        padded // TILE.value,
        BY_BLOCK=layout.group > 0,
        HAS_BIAS=bias_N is not None,
        STAGES=STAGES,
        REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        **launch_options(out_TN.device),
    )
