"""Which kernel makes a dense product: the only place that chooses.

Called by `backend.py`. Never looks at values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.facts import UNPACKED_TOKENS
from octavo.kernels.inputs import NormInput
from octavo.kernels.planes import Planes
from octavo.kernels.triton.product.fp8 import fp8_product
from octavo.kernels.triton.product.hopper import few, fp8_few, ring
from octavo.kernels.triton.product.hopper import fp8 as hopper_fp8
from octavo.kernels.triton.product.linear import product
from octavo.kernels.triton.product.matvec import matvec
from octavo.kernels.triton.product.packed import packed_matvec, packed_product, unpack
from octavo.kernels.triton.product.packed_shapes import (
    few_numbers_shape,
    few_shape,
    fp8_shape,
    packed_shape,
    ring_shape,
    sums_shape,
)
from octavo.kernels.triton.small.norm_quantize import norm_quantize
from octavo.kernels.triton.small.quantize import Fp8Rows, quantize_rows
from octavo.kernels.triton.tiles.fp8 import BLOCK_COLUMNS
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout

SKINNY_TOKENS = 64
"""Up to here Triton multiplies: as fast as cuBLAS, which splits the sum there (H100, 2026-11-22).
Above, and for row counts that 8 divides, cuBLAS gave Triton's bits in all but one shape."""

FEW_LEAST_ROWS, FEW_MOST_ROWS = 2048, 8192
"""Of a matrix that meets few rows by TMA."""
FEW_NUMBERS = 11 << 20
"""Of it, where they are more than 16: Qwen3-30B-A3B's products were 2 % slower so."""

FP8_TOKENS = 256
"""From here on activations are rounded to FP8 where weights are FP8 with a scale a row or, on
Hopper, one for each 128 columns; there fewer are, too, in products made for them."""


def multiply(
    x_TM: Tensor,
    matrix_NM: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shapes: Shapes,
    tickets: Tensor,
    *,
    is_deterministic: bool,
    by_vendor: bool = True,
) -> None:
    """Writes x @ matrix.T (+ bias) to `out_TN`. `by_vendor`: whether the vendor's library may
    multiply; it writes numbers of x's format alone. Deterministic products are all of one kind and
    split no sum."""
    is_same = x_TM.dtype == matrix_NM.dtype
    num_tokens, is_odd = len(x_TM), len(matrix_NM) % 8 != 0
    if num_tokens == 1 and not is_deterministic:
        matvec(x_TM, matrix_NM, bias_N, out_TN, shapes.rows(x_TM, matrix_NM))
    elif takes_few(x_TM, matrix_NM) and not is_deterministic:
        shape = few_numbers_shape(num_tokens, *_tiles_of(matrix_NM))
        few.few_product(x_TM, matrix_NM, bias_N, out_TN, shape, tickets)
    elif is_deterministic or not (by_vendor and is_same) or is_odd or num_tokens <= SKINNY_TOKENS:
        shape = shapes.product(x_TM, matrix_NM)
        if is_deterministic:
            shape = shape.in_one_order()
        product(x_TM, matrix_NM, bias_N, out_TN, shape, tickets)
    elif bias_N is None:
        torch.mm(x_TM, matrix_NM.T, out=out_TN)
    else:
        torch.addmm(bias_N.to(x_TM.dtype), x_TM, matrix_NM.T, out=out_TN)


def takes_few(x_TM: Tensor, matrix_NM: Tensor) -> bool:
    """Whether `hopper/few.py` multiplies x with a matrix: where it was faster than `linear.py` on
    an H200, whose programs read x anew for 16 to 64 rows of the matrix each."""
    num_tokens, num_rows = len(x_TM), len(matrix_NM)
    if not (1 < num_tokens <= 32 and FEW_LEAST_ROWS <= num_rows <= FEW_MOST_ROWS):
        return False
    is_large = num_tokens <= 16 or matrix_NM.numel() >= FEW_NUMBERS
    return is_large and few.fits(x_TM, matrix_NM)


def _tiles_of(matrix_NM: Tensor) -> tuple[int, int]:
    num_rows, length = matrix_NM.shape
    return num_rows, length // few.COLUMNS.value


def rounds_few(x_TM: Tensor, planes: Planes, layout: PlaneLayout, *, is_by_tile: bool) -> bool:
    """Whether x, of few rows but more than one, is rounded to FP8, 128 columns at a time."""
    return 1 < len(x_TM) < FP8_TOKENS and fp8_few.fits(x_TM, planes, layout, is_by_tile=is_by_tile)


def rounds_blocks(x_TM: Tensor, planes: Planes, layout: PlaneLayout) -> bool:
    """Whether x is rounded to FP8, 128 columns at a time, before it meets a weight whose scales
    tiles share."""
    is_many = len(x_TM) >= FP8_TOKENS and layout.group > 0
    return is_many and hopper_fp8.fits(x_TM, planes, layout)


def multiply_packed(
    x_TM: Tensor,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    tickets: Tensor | None = None,
    *,
    is_deterministic: bool,
    is_by_tile: bool = False,
) -> None:
    """As `multiply`, with a packed weight. Deterministic products are tiles, whatever the rows.
    `is_by_tile`: see `Weight`."""
    num_tokens, length = x_TM.shape
    if is_deterministic:
        shape = packed_shape(num_tokens, layout)
        packed_product(x_TM, planes, layout, bias_N, out_TN, shape)
    elif rounds_few(x_TM, planes, layout, is_by_tile=is_by_tile):
        rows = quantize_rows(x_TM, layout.padded(length), by_block=True)
        _multiply_few(rows, planes, layout, bias_N, out_TN, tickets)
    elif is_by_tile and rounds_blocks(x_TM, planes, layout):
        rows = quantize_rows(x_TM, layout.padded(length), by_block=True)
        hopper_fp8.hopper_fp8_product_of(rows, planes, layout, bias_N, out_TN)
    elif num_tokens < UNPACKED_TOKENS and ring.fits(x_TM, planes, layout):
        shape = ring_shape(num_tokens, len(planes.codes), length, layout)
        ring.ring_product(x_TM, planes, layout, bias_N, out_TN, shape, tickets)
    elif num_tokens == 1:
        packed_matvec(x_TM, planes, layout, bias_N, out_TN, sums_shape(layout, length))
    elif layout.values == "e4m3" and layout.group == 0 and num_tokens >= FP8_TOKENS:
        fp8_product(x_TM, planes, layout, bias_N, out_TN, fp8_shape(num_tokens))
    elif num_tokens >= UNPACKED_TOKENS and out_TN.dtype == x_TM.dtype:
        matrix = unpack(planes, layout, length, x_TM.dtype)
        if bias_N is None:
            torch.mm(x_TM, matrix.T, out=out_TN)
        else:
            torch.addmm(bias_N.to(x_TM.dtype), x_TM, matrix.T, out=out_TN)
    else:
        shape = packed_shape(num_tokens, layout)
        packed_product(x_TM, planes, layout, bias_N, out_TN, shape)


def _multiply_few(
    rows: Fp8Rows,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    tickets: Tensor | None,
) -> None:
    num_tokens, padded = rows.numbers.shape
    shape = few_shape(num_tokens, len(planes.codes), padded // BLOCK_COLUMNS)
    fp8_few.fp8_few_product(rows, planes, layout, bias_N, out_TN, shape, tickets)


def takes_normed(rows: NormInput, weight: Weight) -> bool:
    """Whether `norm_fp8_product` serves rows and a weight."""
    planes, layout = weight.planes, weight.layout
    if planes is None or layout is None or weight.cols % BLOCK_COLUMNS:
        return False
    if rows.ranks is not None and rows.ranks.size != 1:
        return False
    if rounds_few(rows.residual_TM, planes, layout, is_by_tile=weight.is_by_tile):
        return True
    return weight.is_by_tile and rounds_blocks(rows.residual_TM, planes, layout)


def norm_fp8_product(
    rows: NormInput, weight: Weight, bias_N: Tensor | None, tickets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns normed rows @ weight.T (+ bias), the rows rounded within the norm, and the
    residual."""
    assert weight.planes is not None
    assert weight.layout is not None
    residual = rows.residual_TM
    if rows.x_TM is None:
        made = norm_quantize(residual, None, rows.weight_M, rows.eps)
    else:
        made = norm_quantize(rows.x_TM, residual, rows.weight_M, rows.eps)
    out = residual.new_empty((len(residual), weight.rows))
    if len(residual) < FP8_TOKENS:
        _multiply_few(made, weight.planes, weight.layout, bias_N, out, tickets)
        return out, residual
    hopper_fp8.hopper_fp8_product_of(made, weight.planes, weight.layout, bias_N, out)
    return out, residual
