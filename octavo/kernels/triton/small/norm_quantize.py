"""RMSNorm whose rows are made FP8 at once, where nothing but a product with FP8 weights takes them.

Called by `backend.py` for many rows. As `norm.py` and `quantize.py` one after the other, but for
the order of the sum; numbers are rounded to those of x's format before they become FP8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.small.norm import MAX_COLUMNS, summed_row
from octavo.kernels.triton.small.quantize import Fp8Rows, empty_rows, warps_of
from octavo.kernels.triton.tiles.fp8 import (
    BLOCK_COLUMNS,
    RUN,
    columns_of_blocks,
    rounded_words,
    store_words,
)


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def norm_quantize_kernel(
    x_TM,
    residual_TM,
    weight_M,
    numbers_TM,
    scales_GT,
    hidden_size,
    x_stride,
    residual_stride,
    eps,
    num_rows,
    HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows of `rms_norm_kernel` as e4m3 with a scale for each block of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = columns_of_blocks(BLOCKS)
    is_in = column < hidden_size
    weight = tl.load(weight_M + column, mask=is_in, other=0.0).to(tl.float32)
    then_weight = tl.load(weight_M + column + RUN, mask=is_in, other=0.0).to(tl.float32)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    x_at = x_TM + token * x_stride + column
    at = residual_TM + token * residual_stride + column
    first = summed_row(x_at, at, is_in, hidden_size, HAS_RESIDUAL, PARTS)
    second = summed_row(x_at + RUN, at + RUN, is_in, hidden_size, HAS_RESIDUAL, PARTS)
    squares = tl.sum(first * first + second * second, 1)
    factor = tl.rsqrt(tl.sum(squares, 0) / hidden_size + eps)
    kind: tl.constexpr = x_TM.dtype.element_ty
    first = (first * factor * weight).to(kind).to(tl.float32)
    second = (second * factor * then_weight).to(kind).to(tl.float32)
    number, scale = rounded_words(first, second, True)
    store_words(number, scale, numbers_TM, token, hidden_size, scales_GT, num_rows, True)


def norm_quantize(
    x_TM: Tensor, residual_TM: Tensor | None, weight_M: Tensor, eps: float
) -> Fp8Rows:
    """Returns the norm of x, or of residual += x (in place), in FP8 with a scale for each 128
    columns, of which there is a whole number. x may be parts, see `rms_norm`."""
    num_tokens, hidden_size = len(x_TM), x_TM.shape[-1]
    assert hidden_size % BLOCK_COLUMNS == 0
    assert hidden_size <= MAX_COLUMNS, (hidden_size, MAX_COLUMNS)
    assert weight_M.shape == (hidden_size,)
    assert x_TM.stride(-1) == 1
    assert x_TM.ndim == 2 or x_TM.is_contiguous()
    residual = x_TM if residual_TM is None else residual_TM
    assert residual.shape == (num_tokens, hidden_size)
    assert residual.stride(1) == 1
    made = empty_rows(num_tokens, hidden_size, x_TM.device, by_block=True)
    if num_tokens:
        norm_quantize_kernel[(num_tokens,)](
            x_TM,
            residual,
            weight_M,
            *made,
            hidden_size,
            x_TM.stride(0),
            residual.stride(0),
            eps,
            num_tokens,
            HAS_RESIDUAL=residual_TM is not None,
            PARTS=x_TM.shape[1] if x_TM.ndim > 2 else 1,
            BLOCKS=next_power_of_2(hidden_size // BLOCK_COLUMNS),
            num_warps=warps_of(hidden_size),
            **launch_options(x_TM.device),
        )
    return made
