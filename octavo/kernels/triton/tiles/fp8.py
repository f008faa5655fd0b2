"""Rows of activations in FP8, in the order of columns that packed weights have.

Used where FP8 weights meet FP8 activations on tensor cores: words of two numbers as bytes, so that
byte 2 w of a run has column w and byte 2 w + 1 column w + RUN; a sum does not care for the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.planes import RUN as _RUN

RUN = tl.constexpr(_RUN)
LARGEST = tl.constexpr(448.0)
BLOCK_COLUMNS = 128
"""Columns that share a scale, where a row has several."""
BLOCK_WORDS = tl.constexpr(BLOCK_COLUMNS // 2)


@triton.jit
def columns_of_blocks(BLOCKS: tl.constexpr):
    """Returns the columns [BLOCKS, BLOCK_WORDS] of the first numbers of a row's words; those of the
    second are RUN further."""
    word = tl.arange(0, BLOCK_WORDS)
    column = word // RUN * (2 * RUN) + word % RUN
    return (tl.arange(0, BLOCKS) * (2 * BLOCK_WORDS))[:, None] + column[None, :]


@triton.jit
def rounded_words(first, second, BY_BLOCK: tl.constexpr):
    """Returns float32 [BLOCKS, BLOCK_WORDS], the first numbers and the second ones of words, as
    e4m3 [BLOCKS, 2 * BLOCK_WORDS] and their scales [BLOCKS]: one a block, or all the same."""
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
    if not BY_BLOCK:
        largest = tl.max(largest, 0) + tl.zeros_like(largest)
    scale = tl.maximum(largest, 1e-10) / LARGEST
    both = tl.join(first, second).reshape(first.shape[0], 2 * BLOCK_WORDS) / scale[:, None]
    return tl.minimum(tl.maximum(both, -LARGEST), LARGEST).to(tl.float8e4nv), scale


@triton.jit
def store_words(
    number, scale, numbers, row, padded, scales, num_rows, BY_BLOCK: tl.constexpr
):  # fmt: skip
    """Writes `rounded_words` as row `row` of e4m3 [R, padded] and of scales [G or 1, R]; nothing
    where row is below 0."""
    block = tl.arange(0, scale.shape[0])
    byte = block[:, None] * (2 * BLOCK_WORDS) + tl.arange(0, 2 * BLOCK_WORDS)[None, :]
    tl.store(numbers + row * padded + byte, number, mask=(byte < padded) & (row >= 0))
    is_scale = block < (padded // (2 * BLOCK_WORDS) if BY_BLOCK else 1)
    tl.store(scales + block.to(tl.int64) * num_rows + row, scale, mask=is_scale & (row >= 0))
