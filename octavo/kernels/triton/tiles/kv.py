"""Tiles of keys and values: the one place that knows how a format of the KV cache is read.

Called by every loop over cached tokens. A plane is a tuple: pointers to its numbers and its scales,
the elements between pages of both, and which scale of a token is the first. FORMAT is "numbers"
(floats without scales), or the name of a `KVFormat`: "fp8", "int8", "int4". Another format is a
branch in tiles/numbers.py, and one in `has_vector_scales` if its vectors have one scale each: that
is never multiplied into keys, but into their column of scores, nor into values, but into their
weights.

Of formats with scales tiles are float16, which has every number exactly and is made of them in few
instructions, or float32 where queries are.

docs/kv_formats.md has the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.formats import KV_FORMATS
from octavo.kernels import kv_codec
from octavo.kernels.triton.tiles.numbers import numbers_of

mixed_size = triton.constexpr_function(kv_codec.mixed_size)


@triton.constexpr_function
def has_vector_scales(format: str) -> bool:
    """Whether all numbers of a vector share one scale."""
    return format in ("fp8", "int8")


@triton.constexpr_function
def is_mixed(format: str) -> bool:
    """Whether vectors that are no keys lie in the basis of `kv_codec.mix`."""
    return format in KV_FORMATS and KV_FORMATS[format].is_mixed


@triton.constexpr_function
def mixes_keys(format: str, is_balanced: bool) -> bool:
    """Whether keys lie in the basis of `kv_codec.mix`; `is_balanced`: divided by a factor."""
    # Triton's compiler follows names, and knows no methods of a dict.
    return format in KV_FORMATS and (
        KV_FORMATS[format].mixes_keys or (KV_FORMATS[format].is_quantized and is_balanced)
    )


@triton.jit
def both_planes(
    key, key_scale, stride_key, stride_key_scale, value, value_scale, stride_value,
    stride_value_scale, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Returns the planes of keys and of values, KEY and VALUE their formats; pages of equal ones
    are equally far apart, so that one address may serve both."""
    if KEY == VALUE:
        stride_value = stride_key
        stride_value_scale = stride_key_scale
    keys = (key, key_scale, stride_key, stride_key_scale, 0)
    return keys, (value, value_scale, stride_value, stride_value_scale, 0)


@triton.jit
def plane_of_head(plane, head, D: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the plane from kv head `head` on, vectors of D numbers."""
    numbers, scales, stride, stride_scales, first = plane
    if FORMAT == "int4":
        numbers += head * (D // 2)
        first = head * (D // 32)
    else:
        numbers += head * D
        first = head
    return numbers, scales, stride, stride_scales, first


@triton.jit
def load_rows(
    plane, row, live, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Returns [N, BLOCK]: WIDTH elements of a plane from each of `row` [N] on; 0 beyond, and with
    MASKED where not live."""
    offs = tl.arange(0, BLOCK)
    at = row[:, None] + offs[None, :]
    if MASKED and WIDTH != BLOCK:
        x = tl.load(plane + at, mask=live[:, None] & (offs < WIDTH)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(plane + at, mask=live[:, None], other=0.0)
    elif WIDTH != BLOCK:
        x = tl.load(plane + at, mask=(offs < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(plane + at)
    return x


@triton.jit
def load_words(
    numbers, row, live, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Returns int32 [N, BLOCK / 4]: `load_rows` of WIDTH bytes from numbers + row [N] on, which are
    multiples of 4."""
    there = (numbers + row).to(tl.pointer_type(tl.int32))
    offs = tl.arange(0, BLOCK // 4)
    at = there[:, None] + offs[None, :]
    if MASKED and WIDTH != BLOCK:
        words = tl.load(at, mask=live[:, None] & (offs < WIDTH // 4)[None, :], other=0)
    elif MASKED:
        words = tl.load(at, mask=live[:, None], other=0)
    elif WIDTH != BLOCK:
        words = tl.load(at, mask=(offs < WIDTH // 4)[None, :], other=0)
    else:
        words = tl.load(at)
    return words


@triton.constexpr_function
def tile_dtype(dtype: tl.dtype, format: str) -> tl.dtype:
    """Of a tile that meets queries of `dtype`."""
    return dtype if format == "numbers" or dtype == tl.float32 else tl.float16


@triton.jit
def kv_tile(
    plane, page, inside, live, dtype: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    FORMAT: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns [N, BLOCK_D] of `tile_dtype`: vectors of D numbers of tokens `inside` [N] of pages
    `page` int64 [N], but for the scales of whole vectors; 0 beyond D, and with MASKED where not
    live. STRIDE: numbers of a token."""
    numbers, scales, stride, stride_scales, first = plane
    if FORMAT == "numbers":
        row = page * stride + inside * STRIDE
        tile = load_rows(numbers, row, live, D, MASKED, BLOCK_D).to(dtype)
    elif FORMAT == "int4":
        row = page * stride + inside * (STRIDE // 2)
        words = load_words(numbers, row, live, D // 2, MASKED, BLOCK_D // 2)
        row = page * stride_scales + inside * (STRIDE // 32) + first
        of_words = load_rows(scales, row, live, D // 32, MASKED, BLOCK_D // 32)
        tile = _unpacked(words, of_words, tile_dtype(dtype, FORMAT))
    else:
        row = page * stride + inside * STRIDE
        words = load_words(numbers, row, live, D, MASKED, BLOCK_D)
        tile = numbers_of(words, FORMAT).to(tile_dtype(dtype, FORMAT))
    return tile


@triton.jit
def _unpacked(words, scales, dtype: tl.constexpr):
    """Returns [N, 8 W] of `dtype`: what words [N, W] of int4 stand for; scales [N, W / 4]."""
    N: tl.constexpr = words.shape[0]
    BLOCKS: tl.constexpr = words.shape[1] // 8
    low_scale, high_scale = tl.split(scales.reshape(N, BLOCKS, 2))
    low = numbers_of(words << 4, "int4").reshape(N, BLOCKS, 32).to(dtype)
    high = numbers_of(words, "int4").reshape(N, BLOCKS, 32).to(dtype)
    low = low * low_scale.to(tl.float32).to(dtype)[:, :, None]
    high = high * high_scale.to(tl.float32).to(dtype)[:, :, None]
    return tl.join(low, high).permute(0, 1, 3, 2).reshape(N, BLOCKS * 64)


@triton.jit
def vector_scales(
    plane, page, inside, live, COUNT: tl.constexpr, MASKED: tl.constexpr, AHEAD: tl.constexpr = 0
):  # fmt: skip
    """Returns float32 [N]: the scales of tokens that have COUNT each, AHEAD behind the first."""
    index = inside * COUNT + plane[4] + AHEAD
    # Two at a time: fewer bytes would not come ahead of their use.
    at = plane[1] + (page * plane[3] + (index & -2))
    at = at.to(tl.pointer_type(tl.int32))
    words = tl.load(at, mask=live, other=0) if MASKED else tl.load(at)
    return tl.where((index & 1) == 0, words << 16, words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def key_scores(
    q, k, plane, page, inside, live, COUNT: tl.constexpr, FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Returns q k^T [M, N] of queries and the keys of which k is the `kv_tile`; COUNT scales a
    token."""
    s = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
    if has_vector_scales(FORMAT):
        s = s * vector_scales(plane, page, inside, live, COUNT, MASKED)[None, :]
    return s


@triton.jit
def add_values(
    acc, p, v, plane, page, inside, live, COUNT: tl.constexpr, FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Returns acc + p v of weights p [M, N] and the values of which v is the `kv_tile`."""
    if has_vector_scales(FORMAT):
        scales = vector_scales(plane, page, inside, live, COUNT, MASKED)
        if v.dtype == tl.float32:
            acc = tl.dot(p * scales[None, :], v, acc, input_precision="ieee")
        else:
            # Weights times scales alone might be too small for float16.
            largest = tl.max(scales, 0)
            p = p * (scales / tl.where(largest > 0, largest, 1.0))[None, :]
            acc = acc + tl.dot(p.to(v.dtype), v) * largest
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc
