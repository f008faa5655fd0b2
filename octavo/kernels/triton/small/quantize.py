"""Rows of activations made FP8 (e4m3) with scales of their own, for products with FP8 weights.

Called by `product/fp8.py` and `experts/fp8.py`. A scale is the largest number of a row, or of a
block of its columns, over 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.fp8 import LARGEST, column_of_byte

BLOCK = 128


class Fp8Rows(NamedTuple):
    """Quantised rows."""

    numbers: Tensor
    """e4m3 [T, padded M], columns in the order of packed weights; 0 beyond M."""
    scales: Tensor
    """float32 [T, G]: one a row, or one for each 128 columns."""


@launchable
@triton.jit
def quantize_kernel(
    x_TM,
    numbers_TM,
    scales_TG,
    length,
    padded,
    num_scales,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantises WIDTH columns of a row with one scale: all of them, or a block."""
    wait_turn(OVERLAP)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    byte = block * WIDTH + tl.arange(0, WIDTH)
    column = column_of_byte(byte)
    x = tl.load(x_TM + row * length + column, mask=column < length, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    scale = tl.maximum(largest, 1e-10) / LARGEST
    number = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    at = numbers_TM + row * padded + byte
    tl.store(at, number.to(numbers_TM.dtype.element_ty), mask=byte < padded)
    tl.store(scales_TG + row * num_scales + block, scale)


def quantize_rows(x_TM: Tensor, padded: int, *, by_block: bool) -> Fp8Rows:
    """Returns the rows of x, `padded` columns wide, with a scale for each row or each block."""
    num_rows, length = x_TM.shape
    assert x_TM.is_contiguous()
    assert padded % BLOCK == 0
    blocks = padded // BLOCK if by_block else 1
    numbers = torch.empty((num_rows, padded), dtype=torch.float8_e4m3fn, device=x_TM.device)
    scales = torch.empty((num_rows, blocks), dtype=torch.float32, device=x_TM.device)
    if not num_rows:
        return Fp8Rows(numbers, scales)
    width = BLOCK if by_block else next_power_of_2(padded)
    quantize_kernel[(num_rows, cdiv(padded, width))](
        x_TM,
        numbers,
        scales,
        length,
        padded,
        blocks,
        WIDTH=width,
        num_warps=1 if by_block else 4 if width <= 4096 else 8,
        **launch_options(x_TM.device),
    )
    return Fp8Rows(numbers, scales)
