"""Packed weights in the sums of products: the one place that knows how their planes are read.

Called by every loop that multiplies with a packed weight. A weight is its planes (codes, scales,
offsets), rows follow each other in each; FORMAT names its `PlaneLayout`. Codes become floats in
registers (`tiles/codes.py`); what is summed within a group is multiplied by its scale once.

Two kinds of sums: `dot_packed` for tiles of tokens by `tl.dot`, `sums_packed` for one token, in
registers. `values_packed` gives the values themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.codes import (
    IS_INTERPRETED,
    bias_of,
    parts_less,
    parts_of,
    raw_parts,
    values_of,
)
from octavo.planes import PLANE_LAYOUTS
from octavo.planes import RUN as _RUN

RUN = tl.constexpr(_RUN)
CHUNK = tl.constexpr(8)
"""Words that a thread loads at once."""


@triton.constexpr_function
def group_of(format: str) -> int:
    return PLANE_LAYOUTS[format].group


@triton.constexpr_function
def step_of(format: str) -> int:
    return PLANE_LAYOUTS[format].step


@triton.constexpr_function
def scale_of(format: str) -> str:
    return PLANE_LAYOUTS[format].scale


@triton.constexpr_function
def offset_of(format: str) -> str:
    return PLANE_LAYOUTS[format].offset


@triton.constexpr_function
def centre_of(format: str) -> int:
    return PLANE_LAYOUTS[format].centre


@triton.constexpr_function
def dot_step(block_k: int, format: str) -> int:
    """Returns the columns of one `dot_packed`, for blocks of a sum that are multiples of a step."""
    layout = PLANE_LAYOUTS[format]
    return layout.step if layout.group else block_k


@triton.constexpr_function
def ends_group(part: int, format: str) -> bool:
    """Whether the next part of a word, if there is one, has another scale."""
    layout = PLANE_LAYOUTS[format]
    if part + 1 == layout.parts:
        return True
    return layout.group > 0 and (part + 1) * _RUN % layout.group == 0


@triton.constexpr_function
def first_of_group(part: int, format: str) -> int:
    """Returns the first part of a word that has the scale of `part`, the last that has it."""
    layout = PLANE_LAYOUTS[format]
    return part + 1 - min(layout.group // _RUN, layout.parts)


@triton.constexpr_function
def group_in_run(part: int, format: str) -> int:
    """Which of the scales of a run of words a part has."""
    group = PLANE_LAYOUTS[format].group
    return part * _RUN // group if group else 0


@triton.jit
def num_groups(length, FORMAT: tl.constexpr):
    """Returns the scales of a row of `length` columns."""
    if group_of(FORMAT) > 0:
        count = tl.cdiv(length, step_of(FORMAT)) * (step_of(FORMAT) // group_of(FORMAT))
    else:
        count = 1
    return count


@triton.jit
def num_words(length, FORMAT: tl.constexpr):
    """Returns the words of a row's codes."""
    return tl.cdiv(length, step_of(FORMAT)) * (step_of(FORMAT) // parts_of(FORMAT))


@triton.jit
def scale_at(planes, place, FORMAT: tl.constexpr):
    """Returns the float32 scales at `place` of the plane."""
    scale = tl.load(planes[1] + place)
    if scale_of(FORMAT) == "e8m0":
        # 2^-127, which is no normal number, is as good as 2^-126.
        bits = tl.maximum(scale.to(tl.int32), 1) << 23
        scale = bits.to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def zero_at(planes, place, FORMAT: tl.constexpr):
    """Returns what codes at `place` mean 0, float32."""
    if offset_of(FORMAT) == "zero":
        zero = tl.load(planes[2] + place).to(tl.float32)
    else:
        zero = tl.full([1, 1], centre_of(FORMAT), tl.float32)
    return zero


@triton.jit
def columns_of(word, FORMAT: tl.constexpr):
    """Returns the column of the first code of each word; those of the next are RUN further."""
    return word // RUN * (RUN * parts_of(FORMAT)) + word % RUN


@triton.jit
def packed_at(planes, row, length, WORDS: tl.constexpr, FORMAT: tl.constexpr):
    """Returns where rows `row` [1, N] of a packed weight begin: pointers to the first WORDS of
    codes [WORDS, N], and the places of the first scales [1, N]."""
    wide = row.to(tl.int64)
    words = planes[0] + wide * num_words(length, FORMAT) + tl.arange(0, WORDS)[:, None]
    return words, wide * num_groups(length, FORMAT)


@triton.jit
def x_tile(
    x_rows,
    is_row,
    start,
    length,
    PART: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Returns the columns of x [T, WORDS] that part PART of so many words from column `start` on
    meets. x_rows, is_row [T, 1]. EVEN_K: there are no columns beyond `length`."""
    column = start + PART * RUN + columns_of(tl.arange(0, WORDS), FORMAT)[None, :]
    is_in = is_row if EVEN_K else is_row & (column < length)
    return tl.load(x_rows + column, mask=is_in, other=0.0)


@triton.jit
def x_tiles(
    x_rows, is_row, start, length, WORDS: tl.constexpr, FORMAT: tl.constexpr, EVEN_K: tl.constexpr
):
    """Returns `x_tile` for each part."""
    a = x_tile(x_rows, is_row, start, length, 0, WORDS, FORMAT, EVEN_K)
    b = x_tile(x_rows, is_row, start, length, 1, WORDS, FORMAT, EVEN_K)
    if parts_of(FORMAT) == 2:
        tiles = (a, b)
    else:
        c = x_tile(x_rows, is_row, start, length, 2, WORDS, FORMAT, EVEN_K)
        d = x_tile(x_rows, is_row, start, length, 3, WORDS, FORMAT, EVEN_K)
        tiles = (a, b, c, d)
    return tiles


@triton.jit
def dot_packed(total, xs, planes, at, start, COMPUTE: tl.constexpr, FORMAT: tl.constexpr):
    """Returns total [T, N] + x @ weight.T over the columns of `x_tiles`, which are a `step` of the
    layout or, where that is one run of words, several groups; of weights with one scale a row
    without it, see `scaled_rows`."""
    GROUP: tl.constexpr = group_of(FORMAT)
    words = tl.load(at[0] + start // parts_of(FORMAT))
    place = at[1]
    if GROUP > 0:
        place += start // GROUP
    if values_of(FORMAT) != "uint":
        numbers = raw_parts(words, COMPUTE, FORMAT)
    elif GROUP == 0 or RUN * parts_of(FORMAT) <= GROUP or offset_of(FORMAT) != "zero":
        numbers = parts_less(words, zero_at(planes, place, FORMAT), COMPUTE, FORMAT)
    else:
        numbers = raw_parts(words, COMPUTE, FORMAT)
    sums = tl.zeros(total.shape, tl.float32)
    if GROUP == 0:
        sums = total
    for part in tl.static_range(parts_of(FORMAT)):
        sums = tl.dot(xs[part].to(COMPUTE), numbers[part], sums, input_precision="ieee")
        if GROUP > 0 and ends_group(part, FORMAT):
            here = place + group_in_run(part, FORMAT)
            scale = scale_at(planes, here, FORMAT)
            total += sums * scale
            if RUN * parts_of(FORMAT) > GROUP and offset_of(FORMAT) == "zero":
                of_x = _sums_of(xs, first_of_group(part, FORMAT), part + 1)
                zero = zero_at(planes, here, FORMAT) + bias_of(COMPUTE, FORMAT)
                total -= of_x * (zero * scale)
            if offset_of(FORMAT) == "min":
                of_x = _sums_of(xs, first_of_group(part, FORMAT), part + 1)
                total += of_x * tl.load(planes[2] + here).to(tl.float32)
            sums = tl.zeros(total.shape, tl.float32)
    if GROUP == 0:
        total = sums
    return total


@triton.jit
def _sums_of(xs, FIRST: tl.constexpr, END: tl.constexpr):
    """Returns [T, 1]: the sums of rows of some tiles."""
    total = tl.sum(xs[FIRST].to(tl.float32), 1)
    for part in tl.static_range(FIRST + 1, END):
        total += tl.sum(xs[part].to(tl.float32), 1)
    return total[:, None]


@triton.jit
def scaled_rows(total, planes, at, FORMAT: tl.constexpr):
    """Returns a whole sum of `dot_packed`, times the scale of its row where rows have one."""
    if group_of(FORMAT) == 0:
        total *= scale_at(planes, at[1], FORMAT)
    return total


@triton.jit
def chunk_sums(values, CHUNKS: tl.constexpr):
    """Returns [.., CHUNKS]: the sums of CHUNK neighbours."""
    wide = values.reshape(*values.shape[:-1], CHUNKS, CHUNK)
    return tl.sum(wide, len(values.shape))


@triton.jit
def sums_packed(
    total, planes, row, x_rows, is_row, start, length, WORDS: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Returns total [.., WORDS / 8] + sums of x * weight over the columns that 8 words of codes
    have, for WORDS of them from column `start` on. row (of the weight), x_rows (pointers to rows of
    x), is_row: of one column, and so many dimensions more."""
    GROUP: tl.constexpr = group_of(FORMAT)
    PARTS: tl.constexpr = parts_of(FORMAT)
    CHUNKS: tl.constexpr = WORDS // CHUNK
    dtype: tl.constexpr = tl.float32 if IS_INTERPRETED else tl.bfloat16
    wide = row.to(tl.int64)
    word, chunk = tl.arange(0, WORDS), tl.arange(0, CHUNKS)
    if len(row.shape) == 3:
        word, chunk = word[None, None, :], chunk[None, None, :]
    else:
        word, chunk = word[None, :], chunk[None, :]
    column = start + columns_of(word, FORMAT)
    first = start + columns_of(chunk * CHUNK, FORMAT)  # of a chunk
    words_at = planes[0] + wide * num_words(length, FORMAT) + start // PARTS + word
    words = tl.load(words_at, mask=is_row & (column < length), other=0)
    numbers = raw_parts(words, dtype, FORMAT)
    place = tl.where(is_row & (first < length), wide * num_groups(length, FORMAT), 0)
    if GROUP > 0:
        place += tl.where(first < length, first // GROUP, 0)
    BIAS: tl.constexpr = bias_of(dtype, FORMAT) + centre_of(FORMAT)
    HAS_X: tl.constexpr = BIAS > 0 or offset_of(FORMAT) != "none"
    kept = tl.zeros([1], tl.float32)
    kept_x = kept
    for part in tl.static_range(PARTS):
        is_in = is_row & (column + part * RUN < length)
        x = tl.load(x_rows + column + part * RUN, mask=is_in, other=0.0).to(tl.float32)
        products = numbers[part].to(tl.float32) * x
        of_x = x
        if part > 0 and not ends_group(part - 1, FORMAT):
            products += kept
            of_x += kept_x
        kept = products
        kept_x = of_x
        if ends_group(part, FORMAT):
            sums = chunk_sums(products, CHUNKS)
            if HAS_X:
                x_sums = chunk_sums(of_x, CHUNKS)
            here = place + group_in_run(part, FORMAT)
            if offset_of(FORMAT) == "zero":
                zero = tl.load(planes[2] + here).to(tl.float32)
                sums -= (zero + bias_of(dtype, FORMAT)) * x_sums
            elif BIAS > 0:
                sums -= BIAS * x_sums
            if GROUP > 0:
                sums *= scale_at(planes, here, FORMAT)
            if offset_of(FORMAT) == "min":
                sums += x_sums * tl.load(planes[2] + here).to(tl.float32)
            total += sums
    return total


@triton.jit
def value_packed(planes, words, row, column, length, PART: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the float32 values of part PART of words int16, which are in `column` of `row`."""
    wide = row.to(tl.int64)
    place = wide * num_groups(length, FORMAT)
    if group_of(FORMAT) > 0:
        place += column // group_of(FORMAT)
    parts = raw_parts(words, tl.float32, FORMAT)
    value = parts[PART]
    if offset_of(FORMAT) == "zero":
        value -= tl.load(planes[2] + place).to(tl.float32)
    elif centre_of(FORMAT) > 0:
        value -= centre_of(FORMAT)
    value *= scale_at(planes, place, FORMAT)
    if offset_of(FORMAT) == "min":
        value += tl.load(planes[2] + place).to(tl.float32)
    return value
