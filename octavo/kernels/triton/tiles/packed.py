"""Packed weights in the sums of products: the one place that knows how their planes are read.

Called by every loop that multiplies with a packed weight. A weight is its planes (codes, scales,
offsets, high bits, factors) and how far their columns are apart (`Planes.arguments`); FORMAT names
its `PlaneLayout`. Codes become floats in registers (`tiles/codes.py`).

Where groups are wide, what is summed within one is multiplied by its scale once, and what all its
codes have in common (a zero, the bias of `raw_parts`) by the sum of x over the group, known
beforehand (`small/group_sums.py`): total += scale * (codes . x) + shift * sum(x). Where they are
narrow, numbers become values, rounded to what tensor cores take, and are summed as those.

Two kinds of sums: `dot_packed` for tiles of tokens by `tl.dot`, whose rows are the weight's, so
that codes go from registers to the tensor cores; `sums_packed` for one token, in registers.
`value_packed` gives the values themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.codes import (
    high_of,
    joined,
    parts_of,
    raw_parts,
)
from octavo.kernels.triton.tiles.scales import (
    factor_of,
    group_of,
    has_offsets,
    has_sums,
    num_factors,
    scale_and_shift,
    scale_number,
)
from octavo.planes import BLOCK as _BLOCK
from octavo.planes import PLANE_LAYOUTS
from octavo.planes import RUN as _RUN

RUN = tl.constexpr(_RUN)
BLOCK = tl.constexpr(_BLOCK)


@triton.constexpr_function
def step_of(format: str) -> int:
    return PLANE_LAYOUTS[format].step


@triton.constexpr_function
def runs_of(format: str) -> int:
    """Runs of words that share a run of high words."""
    return PLANE_LAYOUTS[format].runs


@triton.constexpr_function
def dot_step(block_k: int, format: str) -> int:
    """Returns the columns of one `dot_packed`: all with one scale, or one run of words."""
    layout = PLANE_LAYOUTS[format]
    if layout.is_summed:
        return layout.group or block_k
    return _RUN * layout.parts


@triton.constexpr_function
def is_summed(format: str) -> bool:
    """Whether scales meet what was summed, rather than each number."""
    return PLANE_LAYOUTS[format].is_summed


@triton.constexpr_function
def ends_group(part: int, format: str) -> bool:
    """Whether the next part of a word, if there is one, has another scale."""
    layout = PLANE_LAYOUTS[format]
    if part + 1 == layout.parts:
        return True
    return layout.group > 0 and (part + 1) * _RUN % layout.group == 0


@triton.constexpr_function
def group_in_run(part: int, format: str) -> int:
    """Which of the scales of a run of words a part has."""
    group = PLANE_LAYOUTS[format].group
    return part * _RUN // group if group else 0


@triton.constexpr_function
def groups_in(columns: int, format: str) -> int:
    """Returns the scales of so many columns."""
    group = PLANE_LAYOUTS[format].group
    return columns // group if group else 0


@triton.jit
def num_words(length, FORMAT: tl.constexpr):
    """Returns the words of a row's codes."""
    return tl.cdiv(length, step_of(FORMAT)) * (step_of(FORMAT) // parts_of(FORMAT))


@triton.jit
def num_high_words(length, FORMAT: tl.constexpr):
    """Returns the words of the high bits of a row's codes."""
    return tl.cdiv(length, step_of(FORMAT)) * (step_of(FORMAT) * high_of(FORMAT) // 16)


@triton.jit
def columns_of(word, FORMAT: tl.constexpr):
    """Returns the column of the first code of each word; those of the next are RUN further."""
    return word // RUN * (RUN * parts_of(FORMAT)) + word % RUN


@triton.jit
def packed_at(planes, row, length, WORDS: tl.constexpr, FORMAT: tl.constexpr):
    """Returns where rows `row` [N, 1] of a packed weight begin: pointers to the first WORDS of
    codes [N, WORDS] and of high bits, and the rows."""
    wide = row.to(tl.int64)
    word = tl.arange(0, WORDS)[None, :]
    words = planes[0] + wide * num_words(length, FORMAT) + word
    high = words
    if high_of(FORMAT) > 0:
        high = planes[3] + wide * num_high_words(length, FORMAT) + word
    return words, high, wide


@triton.jit
def block_scales(planes, at, start, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the scales and offsets [N, 1] of each group of a block of columns, and the factors of
    them all, as they lie in memory: what `dot_packed` of the block takes. Loaded a block ahead."""
    if group_of(FORMAT) == 0:
        raw = (start,)
    else:
        place = at[2] + start // group_of(FORMAT) * planes[5]
        raw = (tl.load(planes[1] + place),)
        if has_offsets(FORMAT):
            raw += (tl.load(planes[2] + place),)
        for group in tl.static_range(1, groups_in(BLOCK_K, FORMAT)):
            raw += (tl.load(planes[1] + place + group * planes[5]),)
            if has_offsets(FORMAT):
                raw += (tl.load(planes[2] + place + group * planes[5]),)
        COUNT: tl.constexpr = num_factors(BLOCK_K, FORMAT)
        if COUNT > 0:
            of_block = at[2] + start // BLOCK * num_factors(BLOCK, FORMAT) * planes[5]
            for factor in tl.static_range(COUNT):
                raw += (tl.load(planes[4] + of_block + factor * planes[5]),)
    return raw


@triton.jit
def x_tile(
    x_rows, is_row, start, length, STEP: tl.constexpr, FORMAT: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """Returns the columns of x [T, STEP] from `start` on, in the order of `joined`. x_rows, is_row
    [T, 1]. EVEN_K: there are no columns beyond `length`."""
    WORDS: tl.constexpr = STEP // parts_of(FORMAT)
    place = tl.arange(0, STEP)
    if WORDS > RUN:
        place = columns_of(place % WORDS, FORMAT) + place // WORDS * RUN
        place = tl.max_contiguous(tl.multiple_of(place, 16), 16)
    column = start + place[None, :]
    is_in = is_row if EVEN_K else is_row & (column < length)
    return tl.load(x_rows + column, mask=is_in, other=0.0)


@triton.jit
def sum_of_x(sums_GR, row, is_row, num_rows, start, FORMAT: tl.constexpr):
    """Returns the sums of x [1, T] over the group that begins at `start`; row, is_row [T]. sums_GR:
    of all rows of x, of a product whose format wants them, else anything."""
    if has_sums(FORMAT):
        at = sums_GR + start // group_of(FORMAT) * num_rows + row[None, :]
        sums = tl.load(at, mask=is_row[None, :], other=0.0)
    else:
        sums = 0.0
    return sums


@triton.jit
def numbers_at(at, start, ONE: tl.constexpr, COMPUTE: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the `raw_parts` of the words from column `start` on, those of step ONE of a block."""
    words = tl.load(at[0] + start // parts_of(FORMAT))
    high = words
    if high_of(FORMAT) > 0:
        high = tl.load(at[1] + start // (RUN * parts_of(FORMAT) * runs_of(FORMAT)) * RUN)
    return raw_parts(words, high, ONE % runs_of(FORMAT), COMPUTE, FORMAT)


@triton.jit
def values_at(
    at,
    raw,
    start,
    ONE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns the values [N, columns of a run] from column `start` on, without what `scaled_rows`
    multiplies them with; `raw` as in `dot_packed`."""
    numbers = numbers_at(at, start, ONE, COMPUTE, FORMAT)
    values = (_values(numbers, raw, 0, FIRST, BLOCK_K, COMPUTE, FORMAT),)
    for part in tl.static_range(1, parts_of(FORMAT)):
        values += (_values(numbers, raw, part, FIRST, BLOCK_K, COMPUTE, FORMAT),)
    return joined(values, FORMAT)


@triton.jit
def _values(
    numbers,
    raw,
    PART: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    scale, shift = scale_and_shift(
        *(raw, FIRST + group_in_run(PART, FORMAT)), *(BLOCK_K, COMPUTE, FORMAT)
    )
    return (numbers[PART].to(tl.float32) * scale + shift).to(COMPUTE)


@triton.jit
def dot_packed(
    total,
    x,
    x_sum,
    at,
    raw,
    start,
    ONE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns total [N, T] + weight @ x.T over the columns of `x_tile`, the `dot_step` number ONE
    of a block, whose groups are those from FIRST on of the BLOCK_K columns that `raw` is of; of
    weights with a scale or a factor a row without it, see `scaled_rows`."""
    x_T = x.to(COMPUTE).T
    if not is_summed(FORMAT):
        values = values_at(at, raw, start, ONE, FIRST, BLOCK_K, COMPUTE, FORMAT)
        total = tl.dot(values, x_T, total, input_precision="ieee")
    else:
        numbers = joined(numbers_at(at, start, ONE, COMPUTE, FORMAT), FORMAT)
        if group_of(FORMAT) == 0:
            total = tl.dot(numbers, x_T, total, input_precision="ieee")
        else:
            scale, shift = scale_and_shift(raw, FIRST, BLOCK_K, COMPUTE, FORMAT)
            total += tl.dot(numbers, x_T, input_precision="ieee") * scale
            if has_sums(FORMAT):
                total += x_sum * shift
    return total


@triton.constexpr_function
def loads_ahead(block_k: int, format: str) -> bool:
    """Whether scales are loaded a block ahead: where they are few enough for registers."""
    layout = PLANE_LAYOUTS[format]
    return not layout.group or block_k // layout.group <= 8


@triton.jit
def scales_ahead(planes, at, start, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the `block_scales` of a block that comes next, if they are loaded ahead."""
    if loads_ahead(BLOCK_K, FORMAT):
        raw = block_scales(planes, at, start, BLOCK_K, FORMAT)
    else:
        raw = (start,)
    return raw


@triton.jit
def add_step(
    total,
    x,
    x_sum,
    planes,
    at,
    raw,
    start,
    ONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns total after step ONE of a block; `raw` is what `scales_ahead` returned of it."""
    STEP: tl.constexpr = dot_step(BLOCK_K, FORMAT)
    if loads_ahead(BLOCK_K, FORMAT):
        total = dot_packed(
            *(total, x, x_sum, at, raw, start),
            *(ONE, ONE * groups_in(STEP, FORMAT), BLOCK_K, COMPUTE, FORMAT),
        )
    else:
        of_step = block_scales(planes, at, start, STEP, FORMAT)
        total = dot_packed(*(total, x, x_sum, at, of_step, start), *(ONE, 0, STEP, COMPUTE, FORMAT))
    return total


@triton.jit
def scaled_rows(total, planes, row, FORMAT: tl.constexpr):
    """Returns whole sums, times the scale or factor of their rows where rows have one; row
    broadcasts to them."""
    if group_of(FORMAT) == 0:
        total *= scale_number(tl.load(planes[1] + row), FORMAT)
    elif factor_of(FORMAT) == "row":
        total *= tl.load(planes[4] + row)
    return total


@triton.jit
def packed_rows(
    x_RM,
    sums_GR,
    planes,
    row,
    is_row,
    num_rows,
    weight_row,
    length,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns weight @ x.T [N, T] of some rows of a weight and of x: weight_row [N], row [T], which
    are those that is_row. x_RM: rows of `length` numbers, num_rows in all; sums_GR their
    `group_sums`."""
    STEP: tl.constexpr = dot_step(BLOCK_K, FORMAT)
    WORDS: tl.constexpr = STEP // parts_of(FORMAT)
    x_rows = x_RM + row.to(tl.int64)[:, None] * length
    at = packed_at(planes, weight_row[:, None], length, WORDS, FORMAT)
    total = tl.zeros([weight_row.shape[0], row.shape[0]], tl.float32)
    raw = scales_ahead(planes, at, 0, BLOCK_K, FORMAT)
    last = tl.cdiv(length, BLOCK_K) * BLOCK_K - BLOCK_K
    for first in tl.range(0, length, BLOCK_K, num_stages=STAGES):
        following = scales_ahead(planes, at, tl.minimum(first + BLOCK_K, last), BLOCK_K, FORMAT)
        for one in tl.static_range(BLOCK_K // STEP):
            start = first + one * STEP
            x = x_tile(x_rows, is_row[:, None], start, length, STEP, FORMAT, EVEN_K)
            x_sum = sum_of_x(sums_GR, row, is_row, num_rows, start, FORMAT)
            total = add_step(
                *(total, x, x_sum, planes, at, raw, start),
                *(one, BLOCK_K, COMPUTE, FORMAT),
            )
        raw = following
    return scaled_rows(total, planes, at[2], FORMAT)


@triton.jit
def packed_pair_of_rows(
    x_RM,
    sums_GR,
    first_planes,
    second_planes,
    row,
    is_row,
    num_rows,
    weight_row,
    length,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns `packed_rows` of two weights at once, which meet the same x."""
    STEP: tl.constexpr = dot_step(BLOCK_K, FORMAT)
    WORDS: tl.constexpr = STEP // parts_of(FORMAT)
    x_rows = x_RM + row.to(tl.int64)[:, None] * length
    at_first = packed_at(first_planes, weight_row[:, None], length, WORDS, FORMAT)
    at_second = packed_at(second_planes, weight_row[:, None], length, WORDS, FORMAT)
    first_total = tl.zeros([weight_row.shape[0], row.shape[0]], tl.float32)
    second_total = tl.zeros([weight_row.shape[0], row.shape[0]], tl.float32)
    raw_first = scales_ahead(first_planes, at_first, 0, BLOCK_K, FORMAT)
    raw_second = scales_ahead(second_planes, at_second, 0, BLOCK_K, FORMAT)
    last = tl.cdiv(length, BLOCK_K) * BLOCK_K - BLOCK_K
    for block in tl.range(0, length, BLOCK_K, num_stages=STAGES):
        ahead = tl.minimum(block + BLOCK_K, last)
        next_first = scales_ahead(first_planes, at_first, ahead, BLOCK_K, FORMAT)
        next_second = scales_ahead(second_planes, at_second, ahead, BLOCK_K, FORMAT)
        for one in tl.static_range(BLOCK_K // STEP):
            start = block + one * STEP
            x = x_tile(x_rows, is_row[:, None], start, length, STEP, FORMAT, EVEN_K)
            x_sum = sum_of_x(sums_GR, row, is_row, num_rows, start, FORMAT)
            first_total = add_step(
                *(first_total, x, x_sum, first_planes, at_first, raw_first, start),
                *(one, BLOCK_K, COMPUTE, FORMAT),
            )
            second_total = add_step(
                *(second_total, x, x_sum, second_planes, at_second, raw_second, start),
                *(one, BLOCK_K, COMPUTE, FORMAT),
            )
        raw_first = next_first
        raw_second = next_second
    first_total = scaled_rows(first_total, first_planes, at_first[2], FORMAT)
    return first_total, scaled_rows(second_total, second_planes, at_second[2], FORMAT)
