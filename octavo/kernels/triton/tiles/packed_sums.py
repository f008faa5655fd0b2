"""Packed weights in registers, without tensor cores: the sums of one token, and values themselves.

Called by matrix-vector kernels and by what unpacks. `packed.py` has tiles, and tells how planes are
read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.codes import IS_INTERPRETED, high_of, parts_of, raw_parts
from octavo.kernels.triton.tiles.packed import (
    BLOCK,
    RUN,
    columns_of,
    ends_group,
    group_in_run,
    num_high_words,
    num_words,
    runs_of,
    scaled_rows,
)
from octavo.kernels.triton.tiles.scales import (
    group_of,
    has_offsets,
    has_shift,
    num_factors,
    scale_and_shift,
    scale_zero_minimum,
)

CHUNK = tl.constexpr(8)
"""Words that a thread loads at once."""


@triton.jit
def high_word(word, FORMAT: tl.constexpr):
    """Returns which word has the high bits of a word's codes."""
    return word // (RUN * runs_of(FORMAT)) * RUN + word % RUN


@triton.jit
def chunk_sums(values, CHUNKS: tl.constexpr):
    """Returns [.., CHUNKS]: the sums of CHUNK neighbours."""
    wide = values.reshape(*values.shape[:-1], CHUNKS, CHUNK)
    return tl.sum(wide, len(values.shape))


@triton.jit
def raw_scales(planes, row, group, FORMAT: tl.constexpr):
    """Returns the `block_scales` of one group of each row, which broadcast."""
    place = row + group * planes[5]
    raw = (tl.load(planes[1] + place),)
    if has_offsets(FORMAT):
        raw += (tl.load(planes[2] + place),)
    COUNT: tl.constexpr = num_factors(BLOCK, FORMAT)
    if COUNT > 0:
        of_block = row + group // (BLOCK // group_of(FORMAT)) * COUNT * planes[5]
        for factor in tl.static_range(COUNT):
            raw += (tl.load(planes[4] + of_block + factor * planes[5]),)
    return raw


@triton.jit
def _words_along(row, WORDS: tl.constexpr):
    """Returns the numbers of WORDS words, of as many dimensions as row has."""
    word = tl.arange(0, WORDS)
    return word[None, None, :] if len(row.shape) == 3 else word[None, :]


@triton.jit
def words_of(planes, row, is_row, start, length, WORDS: tl.constexpr, FORMAT: tl.constexpr):
    """Returns WORDS words of codes of rows of the weight, from column `start` on, and the words of
    their high bits, moved to where theirs begin; none beyond `length`."""
    wide, word = row.to(tl.int64), _words_along(row, WORDS)
    is_there = is_row & (start + columns_of(word, FORMAT) < length)
    word += start // parts_of(FORMAT)
    words = tl.load(planes[0] + wide * num_words(length, FORMAT) + word, mask=is_there, other=0)
    high = words
    if high_of(FORMAT) > 0:
        at = planes[3] + wide * num_high_words(length, FORMAT) + high_word(word, FORMAT)
        high = tl.load(at, mask=is_there, other=0).to(tl.uint16, bitcast=True)
        run = word // RUN % runs_of(FORMAT) * (high_of(FORMAT) * parts_of(FORMAT))
        high = (high >> run.to(tl.uint16)).to(tl.int16, bitcast=True)
    return words, high


@triton.jit
def sums_packed(
    total, planes, row, x_rows, is_row, start, length, WORDS: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Returns total [.., WORDS / 8] + sums of x * weight over the columns that 8 words of codes
    have, for WORDS of them from column `start` on. row (of the weight), x_rows (pointers to rows of
    x), is_row: of one column, and so many dimensions more."""
    words, high = words_of(planes, row, is_row, start, length, WORDS, FORMAT)
    return sums_of_words(
        total, words, high, planes, row, x_rows, is_row, start, length, WORDS, FORMAT
    )


@triton.jit
def sums_of_words(
    total, words, high, planes, row, x_rows, is_row, start, length, WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """As `sums_packed`, of words that `words_of` has brought."""
    GROUP: tl.constexpr = group_of(FORMAT)
    CHUNKS: tl.constexpr = WORDS // CHUNK
    dtype: tl.constexpr = tl.float32 if IS_INTERPRETED else tl.bfloat16
    wide = row.to(tl.int64)
    column = start + columns_of(_words_along(row, WORDS), FORMAT)
    first = start + columns_of(_words_along(row, CHUNKS) * CHUNK, FORMAT)  # of a chunk
    numbers = raw_parts(words, high, 0, dtype, FORMAT)
    safe = tl.where(is_row, wide, 0)
    kept = tl.zeros([1], tl.float32)
    kept_x = kept
    for part in tl.static_range(parts_of(FORMAT)):
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
            if GROUP > 0:
                group = tl.where(first < length, first // GROUP + group_in_run(part, FORMAT), 0)
                raw = raw_scales(planes, safe, group, FORMAT)
                scale, shift = scale_and_shift(raw, 0, GROUP, dtype, FORMAT)
                sums *= scale
                if has_shift(FORMAT):
                    sums += chunk_sums(of_x, CHUNKS) * shift
            total += sums
    return total


@triton.jit
def value_packed(
    planes, words, high, row, column, PART: tl.constexpr, SUB, FORMAT: tl.constexpr
):  # fmt: skip
    """Returns the float32 values of part PART of words int16, which are in `column` of `row`, their
    high bits the part SUB of the high words."""
    wide = row.to(tl.int64)
    if high_of(FORMAT) > 0:
        run = SUB * (high_of(FORMAT) * parts_of(FORMAT))
        high = (high.to(tl.int32) >> run).to(tl.int16)
    value = raw_parts(words, high, 0, tl.float32, FORMAT)[PART]
    if group_of(FORMAT) == 0:
        return scaled_rows(value, planes, wide, FORMAT)
    raw = raw_scales(planes, wide, column // group_of(FORMAT), FORMAT)
    scale, zero, minimum = scale_zero_minimum(raw, 0, group_of(FORMAT), FORMAT)
    scale = scaled_rows(scale, planes, wide, FORMAT)
    return (value - zero) * scale + minimum
