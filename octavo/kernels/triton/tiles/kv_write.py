"""Vectors on their way into the KV cache: mixed, quantised and stored, as `kv_codec` specifies.

Called by every kernel that writes keys, values or latent vectors. tiles/kv.py reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels import kv_codec
from octavo.kernels.triton.tiles.kv import has_vector_scales, mixed_size

LEAST_ALONG = tl.constexpr(kv_codec.LEAST_ALONG)
LEAST_SCALE = tl.constexpr(2.0**-126)
"""Numbers with a smaller scale become 0."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it and taken off again is rounded half to even."""


@triton.constexpr_function
def _steps(size: int) -> int:
    return size.bit_length() - 1


@triton.jit
def mixed(x, D: tl.constexpr, IS_MIXED: tl.constexpr):
    """Returns x [R, BLOCK_D] float32, vectors of D numbers, as `kv_codec.mix` does if IS_MIXED."""
    if IS_MIXED:
        SIZE: tl.constexpr = mixed_size(D)
        R: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        for step in tl.static_range(_steps(SIZE)):
            pairs = x.reshape(R, C // (2 << step), 2, 1 << step).permute(0, 1, 3, 2)
            low, high = tl.split(pairs)
            x = tl.join(low + high, low - high).permute(0, 1, 3, 2).reshape(R, C)
        x = x * SIZE**-0.5
    return x


@triton.jit
def _rounded_scale(scale):
    """Returns float32 as bfloat16 has it, half to even."""
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)


@triton.jit
def _over(x, y, inverse):
    """Returns x / y, rounded as a division is where nothing is too small: three instructions."""
    about = x * inverse
    return tl.fma(tl.fma(-y, about, x), inverse, about)


@triton.jit
def _scale_of(x, LARGEST: tl.constexpr):
    """Returns, of x [.., N], the scales [..] with which the largest of |x| is LARGEST; NaN where a
    number is not finite."""
    # As integers, what is not finite is the largest: a maximum of floats drops NaN.
    top = tl.max(tl.abs(x).to(tl.int32, bitcast=True), len(x.shape) - 1)
    largest = top.to(tl.float32, bitcast=True)
    return _rounded_scale(
        tl.where(top < 0x7F800000, _over(largest, LARGEST, 1.0 / LARGEST), float("nan"))
    )


@triton.jit
def _in_steps(x, scale, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Returns x [.., N] over its scales [..], clamped; 0 where that is 0."""
    inverse = tl.where(scale < LEAST_SCALE, 0.0, 1.0 / scale).expand_dims(len(scale.shape))
    steps = _over(x, scale.expand_dims(len(scale.shape)), inverse)
    return tl.minimum(tl.maximum(steps, LOWEST), HIGHEST)


@triton.jit
def _rounded(steps):
    return (steps + ROUNDER) - ROUNDER


@triton.jit
def store_vectors(
    numbers, row, scales, scale_row, x, mask, given, D: tl.constexpr, FORMAT: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    """Stores the R vectors x [R, BLOCK_D] float32, 0 beyond D and `mixed`, at numbers + row [R] and
    scales + scale_row [R] where `mask` [R]. HAS_GIVEN: `given` [R] are the scales of 8 bits."""
    BLOCK_D: tl.constexpr = x.shape[1]
    d = tl.arange(0, BLOCK_D)
    here = mask[:, None] & (d < D)[None, :]
    if FORMAT == "numbers":
        tl.store(numbers + (row[:, None] + d[None, :]), x.to(numbers.dtype.element_ty), mask=here)
    elif FORMAT == "int4":
        _store_packed(numbers, row, scales, scale_row, x, mask, D, BLOCK_D)
    else:
        tl.static_assert(has_vector_scales(FORMAT))
        LARGEST: tl.constexpr = 448.0 if FORMAT == "fp8" else 127.0
        scale = _scale_of(x, LARGEST)
        if HAS_GIVEN:
            scale = tl.where(scale == scale, _rounded_scale(given), scale)
        steps = _in_steps(x, scale, -LARGEST, LARGEST)
        if FORMAT == "int8":
            steps = _rounded(steps)
        at = numbers + (row[:, None] + d[None, :])
        tl.store(at, steps.to(numbers.dtype.element_ty), mask=here)
        tl.store(scales + scale_row, scale.to(scales.dtype.element_ty), mask=mask)


@triton.jit
def _store_packed(
    numbers, row, scales, scale_row, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    R: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = BLOCK_D // 64
    groups = x.reshape(R, 2 * BLOCKS, 32)
    scale = _scale_of(groups, 7.5)
    steps = _rounded(_in_steps(groups, scale, -8.0, 8.0) + 7.5)
    steps = tl.minimum(tl.maximum(steps, 0.0), 15.0)
    # As long along x as x is: `kv_codec`.
    stored = ((steps - 7.5) * scale[:, :, None]).reshape(R, BLOCK_D)
    along, square = tl.sum(x * stored, 1), tl.sum(x * x, 1)
    is_sound = (along > LEAST_ALONG) & (along + square < float("inf"))
    factor = tl.where(is_sound, tl.div_rn(square, tl.where(is_sound, along, 1.0)), 1.0)
    scale = _rounded_scale(scale * factor[:, None])
    codes = steps.to(tl.int32).reshape(R, BLOCKS, 2, 32).permute(0, 1, 3, 2)
    first, second = tl.split(codes)
    packed = (first | (second << 4)).reshape(R, BLOCK_D // 2).to(tl.uint8)
    i = tl.arange(0, BLOCK_D // 2)
    here = mask[:, None] & (i < D // 2)[None, :]
    tl.store(numbers + (row[:, None] + i[None, :]), packed, mask=here)
    g = tl.arange(0, BLOCK_D // 32)
    here = mask[:, None] & (g < D // 32)[None, :]
    at = scales + (scale_row[:, None] + g[None, :])
    tl.store(at, scale.to(scales.dtype.element_ty), mask=here)
