"""Rows of activations made FP8 (e4m3) with scales of their own, for products with FP8 weights.

Called by products and experts of FP8; `norm_quantize.py` does it within the norm. A scale is the
largest number of a row, or of a block of its columns, over 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.tiles.fp8 import (
    BLOCK_COLUMNS,
    RUN,
    columns_of_blocks,
    rounded_words,
    store_words,
)

ANNOUNCED_TOKENS = 256
"""Up to so many the next kernel may come early: with more it takes room from the rows' programs."""


class Fp8Rows(NamedTuple):
    """Quantised rows."""

    numbers: Tensor
    """e4m3 [R, padded M], columns in the order of packed weights; 0 beyond M."""
    scales: Tensor
    """float32 [G, R]: one a row, or one for each 128 columns."""


def empty_rows(num_rows: int, padded: int, device: torch.device, *, by_block: bool) -> Fp8Rows:
    """Returns rows of `padded` columns that are yet to be filled."""
    assert padded % BLOCK_COLUMNS == 0
    numbers = torch.empty((num_rows, padded), dtype=torch.float8_e4m3fn, device=device)
    count = padded // BLOCK_COLUMNS if by_block else 1
    return Fp8Rows(numbers, numbers.new_empty((count, num_rows), dtype=torch.float32))


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
    ANNOUNCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantises a row, with one scale or with one for each block of its columns.

    Row t of x becomes row t, or where TOP_K is not 0 the rows places_P[t * TOP_K ..], none where
    that is -1.
    """
    wait_turn(OVERLAP)
    announce(ANNOUNCE and OVERLAP)
    source = tl.program_id(0).to(tl.int64)
    column = columns_of_blocks(BLOCKS)
    at = x_TM + source * length + column
    first = tl.load(at, mask=column < length, other=0.0).to(tl.float32)
    second = tl.load(at + RUN, mask=column + RUN < length, other=0.0).to(tl.float32)
    number, scale = rounded_words(first, second, BY_BLOCK)
    for choice in tl.static_range(max(TOP_K, 1)):
        row = source
        if TOP_K > 0:
            row = tl.load(places_P + source * TOP_K + choice).to(tl.int64)
        store_words(number, scale, numbers_RM, row, padded, scales_GR, num_rows, BY_BLOCK)


def quantize_rows(
    x_TM: Tensor, padded: int, *, by_block: bool, places_P: Tensor | None = None
) -> Fp8Rows:
    """Returns the rows of x, `padded` columns wide, with a scale for each row or each block.

    `places_P` int32: where the rows go, as many of them for each row of x; -1: nowhere.
    """
    num_tokens, length = x_TM.shape
    assert x_TM.is_contiguous()
    num_rows = num_tokens if places_P is None else len(places_P)
    made = empty_rows(num_rows, padded, x_TM.device, by_block=by_block)
    if not num_rows:
        return made
    quantize_kernel[(num_tokens,)](
        x_TM,
        x_TM if places_P is None else places_P,
        *made,
        length,
        padded,
        num_rows,
        TOP_K=0 if places_P is None else num_rows // num_tokens,
        BLOCKS=next_power_of_2(padded // BLOCK_COLUMNS),
        BY_BLOCK=by_block,
        ANNOUNCE=num_tokens <= ANNOUNCED_TOKENS,
        num_warps=warps_of(padded),
        **launch_options(x_TM.device),
    )
    return made
