"""Rows of activations made FP8 (e4m3) with scales of their own, for products with FP8 weights.

Called by `product/fp8.py` and the experts of FP8. A scale is the largest number of a row, or of a
block of its columns, over 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.fp8 import LARGEST, column_of_byte

BLOCK = 128
_BLOCK = tl.constexpr(BLOCK)


class Fp8Rows(NamedTuple):
    """Quantised rows."""

    numbers: Tensor
    """e4m3 [R, padded M], columns in the order of packed weights; 0 beyond M."""
    scales: Tensor
    """float32 [G, R]: one a row, or one for each 128 columns."""


def warps_of(padded: int) -> int:
    """Returns how many warps round a row of so many columns: a power of two."""
    return max(1, min(8, next_power_of_2(padded) // 512))


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    x_TM,
    places_P,
    numbers_RM,
    scales_GR,
    length,
    padded,
    num_rows,
    TOP_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantises a row, with one scale or with one for each block of its columns.

    Row t of x becomes row t, or where TOP_K is not 0 the rows places_P[t * TOP_K ..], none where
    that is -1.
    """
    wait_turn(OVERLAP)
    source = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    byte = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    column = column_of_byte(byte)
    x = tl.load(x_TM + source * length + column, mask=column < length, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    if not BY_BLOCK:
        largest = tl.max(largest, 0) + tl.zeros([BLOCKS], tl.float32)
    scale = tl.maximum(largest, 1e-10) / LARGEST
    number = tl.minimum(tl.maximum(x / scale[:, None], -LARGEST), LARGEST)
    number = number.to(numbers_RM.dtype.element_ty)
    is_scale = block < (padded // _BLOCK if BY_BLOCK else 1)
    for choice in tl.static_range(max(TOP_K, 1)):
        row = source
        if TOP_K > 0:
            row = tl.load(places_P + source * TOP_K + choice).to(tl.int64)
        at = numbers_RM + row * padded + byte
        tl.store(at, number, mask=(byte < padded) & (row >= 0))
        at = scales_GR + block.to(tl.int64) * num_rows + row
        tl.store(at, scale, mask=is_scale & (row >= 0))


def quantize_rows(
    x_TM: Tensor, padded: int, *, by_block: bool, places_P: Tensor | None = None
) -> Fp8Rows:
    """Returns the rows of x, `padded` columns wide, with a scale for each row or each block.

    `places_P` int32: where the rows go, as many of them for each row of x; -1: nowhere.
    """
    num_tokens, length = x_TM.shape
    assert x_TM.is_contiguous()
    assert padded % BLOCK == 0
    num_rows = num_tokens if places_P is None else len(places_P)
    numbers = torch.empty((num_rows, padded), dtype=torch.float8_e4m3fn, device=x_TM.device)
    blocks = padded // BLOCK
    scales = numbers.new_empty((blocks if by_block else 1, num_rows), dtype=torch.float32)
    if not num_rows:
        return Fp8Rows(numbers, scales)
    quantize_kernel[(num_tokens,)](
        x_TM,
        x_TM if places_P is None else places_P,
        numbers,
        scales,
        length,
        padded,
        num_rows,
        TOP_K=0 if places_P is None else num_rows // num_tokens,
        BLOCKS=next_power_of_2(blocks),
        BY_BLOCK=by_block,
        num_warps=warps_of(padded),
        **launch_options(x_TM.device),
    )
    return Fp8Rows(numbers, scales)
