"""Scales, zeros, minima and factors of packed weights as floats.

Called by `tiles/packed.py`, which loads them. See `octavo.planes`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.codes import bias_of, e4m3_number
from octavo.planes import BLOCK, PLANE_LAYOUTS


@triton.constexpr_function
def group_of(format: str) -> int:
    return PLANE_LAYOUTS[format].group


@triton.constexpr_function
def scale_of(format: str) -> str:
    return PLANE_LAYOUTS[format].scale


@triton.constexpr_function
def offset_of(format: str) -> str:
    return PLANE_LAYOUTS[format].offset


@triton.constexpr_function
def factor_of(format: str) -> str:
    return PLANE_LAYOUTS[format].factor


@triton.constexpr_function
def centre_of(format: str) -> int:
    return PLANE_LAYOUTS[format].centre


@triton.constexpr_function
def has_offsets(format: str) -> bool:
    """Whether offsets have a plane of their own."""
    return PLANE_LAYOUTS[format].num_offsets(256) > 0


@triton.constexpr_function
def has_sums(format: str) -> bool:
    """Whether products of several rows need the sums of x over each group."""
    layout = PLANE_LAYOUTS[format]
    return layout.group > 0 and layout.is_summed and has_shift(format)


@triton.constexpr_function
def has_shift(format: str) -> bool:
    """Whether values are more than scale times number."""
    layout = PLANE_LAYOUTS[format]
    return layout.values == "uint" or layout.offset != "none"


@triton.constexpr_function
def num_factors(columns: int, format: str) -> int:
    """Returns the factors of so many columns, of layouts that have some by blocks."""
    layout = PLANE_LAYOUTS[format]
    return layout.num_factors(columns) if layout.factor == "block" else 0


@triton.constexpr_function
def _place(group: int, format: str) -> int:
    """Returns which of a block's raw scales is that of a group; its offset follows."""
    return group * (2 if has_offsets(format) else 1)


@triton.constexpr_function
def _factor_place(group: int, block_k: int, format: str) -> int:
    """Returns which of a block's raw scales is the factor of a group."""
    layout = PLANE_LAYOUTS[format]
    first = _place(block_k // layout.group, format)
    return first + group * layout.group // BLOCK * layout.num_factors(BLOCK)


@triton.jit
def scale_number(scale, FORMAT: tl.constexpr):
    """Returns scales as float32, without a factor."""
    if scale_of(FORMAT) == "e8m0":
        # 2^-127, which is no normal number, is as good as 2^-126.
        bits = tl.maximum(scale.to(tl.int32), 1) << 23
        scale = bits.to(tl.float32, bitcast=True)
    elif scale_of(FORMAT) == "e4m3":
        scale = e4m3_number(scale.to(tl.int32))
    elif scale_of(FORMAT) == "u4":
        scale = scale & 15
    return scale.to(tl.float32)


@triton.jit
def scale_zero_minimum(raw, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    """Returns float32 scale, zero and minimum of group GROUP of a block of BLOCK_K columns, whose
    `raw` ones are as `block_scales` loads them: a value is (code - zero) * scale + minimum."""
    first = raw[_place(GROUP, FORMAT)]
    scale = scale_number(first, FORMAT)
    zero = centre_of(FORMAT) * 1.0
    minimum = 0.0
    if factor_of(FORMAT) == "block":
        scale *= raw[_factor_place(GROUP, BLOCK_K, FORMAT)].to(tl.float32)
    if offset_of(FORMAT) == "zero":
        zero = raw[_place(GROUP, FORMAT) + 1].to(tl.float32)
    elif offset_of(FORMAT) == "min":
        if scale_of(FORMAT) == "u4":
            minimum = (first.to(tl.int32) >> 4).to(tl.float32)
        else:
            minimum = raw[_place(GROUP, FORMAT) + 1].to(tl.float32)
        if factor_of(FORMAT) == "block":
            minimum *= -raw[_factor_place(GROUP, BLOCK_K, FORMAT) + 1].to(tl.float32)
    return scale, zero, minimum


@triton.jit
def scale_and_shift(
    raw, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, FORMAT: tl.constexpr
):
    """Returns scale and shift: a value is scale times the number that `raw_parts` gives in COMPUTE,
    plus shift."""
    scale, zero, minimum = scale_zero_minimum(raw, GROUP, BLOCK_K, FORMAT)
    return scale, minimum - (zero + bias_of(COMPUTE, FORMAT)) * scale
