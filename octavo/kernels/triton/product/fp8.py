"""Dense products of FP8 weights with FP8 activations, on tensor cores of FP8.

Called by `choose.py` for many rows. Activations are quantised anew for every product, by row, for
weights whose rows have one scale.

Shape legend: T tokens, M columns of the weight, N rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.planes import Planes
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.product.packed_shapes import Fp8Shape
from octavo.kernels.triton.small.quantize import Fp8Rows, quantize_rows
from octavo.kernels.triton.tiles.grid import tile_of_program
from octavo.planes import PlaneLayout


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def fp8_product_kernel(
    x_TM,
    x_scales_T,
    weight_NM,
    scales_N,
    bias_N,
    out_TN,
    num_tokens,
    num_rows,
    padded,
    out_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m], times their scales (+ bias[n]).

    x_TM and weight_NM are descriptors of e4m3 [T, padded] and [N, padded] in blocks [BLOCK_T or
    BLOCK_N, BLOCK_K]; out_TN [T, N] with a row stride, bias_N [N] any float.
    """
    row_block, column_block = tile_of_program(
        tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_N), GROUP
    )
    wait_turn(OVERLAP)
    token = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = token < num_tokens, column < num_rows
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, padded, BLOCK_K):
        x = x_TM.load([row_block * BLOCK_T, start])
        total = tl.dot(x, weight_NM.load([column_block * BLOCK_N, start]).T, total)
    x_scale = tl.load(x_scales_T + tl.where(is_token, token, 0))
    total *= x_scale[:, None] * tl.load(scales_N + tl.where(is_column, column, 0))[None, :]
    if HAS_BIAS:
        total += tl.load(bias_N + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out = out_TN + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out, total.to(out_TN.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


def fp8_product(
    x_TM: Tensor,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: Fp8Shape,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, x rounded to FP8."""
    padded = layout.padded(x_TM.shape[1])
    rows = quantize_rows(x_TM, padded, by_block=False)
    fp8_product_of(rows, planes, layout, bias_N, out_TN, shape)


def fp8_product_of(
    rows: Fp8Rows,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: Fp8Shape,
) -> None:
    """As `fp8_product`, of rows that are quantised."""
    num_tokens, padded = rows.numbers.shape
    num_rows = len(planes.codes)
    assert out_TN.shape == (num_tokens, num_rows)
    assert layout.values == "e4m3"
    if num_tokens == 0:
        return
    weight = planes.codes.view(rows.numbers.dtype)
    assert weight.shape == (num_rows, padded)
    grid = cdiv(num_tokens, shape.block_t) * cdiv(num_rows, shape.block_n)
    fp8_product_kernel[(grid,)](
        TensorDescriptor.from_tensor(rows.numbers, [shape.block_t, shape.block_k]),
        rows.scales,
        TensorDescriptor.from_tensor(weight, [shape.block_n, shape.block_k]),
        planes.scales,
        out_TN if bias_N is None else bias_N,
        out_TN,
        num_tokens,
        num_rows,
        padded,
        out_TN.stride(0),
        BLOCK_T=shape.block_t,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        GROUP=16,
        HAS_BIAS=bias_N is not None,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **launch_options(out_TN.device),
    )
