"""Dense products with packed weights, and packed weights made numbers.

Called by `choose.py`: one row is summed in registers, up to some hundreds in tiles whose codes
become floats in registers. For more the weight is unpacked once a step and multiplied as numbers
are: unpacking it again for every tile of tokens would take longer.

Shape legend: T tokens, M columns of the weight, N rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.planes import Planes
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.numbers import TL_DTYPES
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.product.packed_shapes import PackedShape, SumsShape, block_constants
from octavo.kernels.triton.small.group_sums import group_sums
from octavo.kernels.triton.tiles.codes import high_of, parts_of
from octavo.kernels.triton.tiles.grid import tile_of_program
from octavo.kernels.triton.tiles.packed import (
    RUN,
    block_scales,
    columns_of,
    num_high_words,
    num_words,
    packed_at,
    packed_rows,
    runs_of,
    scaled_rows,
    values_at,
)
from octavo.kernels.triton.tiles.packed_sums import (
    CHUNK,
    high_word,
    sums_of_words,
    sums_packed,
    value_packed,
    words_of,
)
from octavo.kernels.triton.tiles.scales import group_of
from octavo.planes import PlaneLayout


@launchable
@triton.jit
def packed_matvec_kernel(
    x_M,
    planes,
    bias_N,
    out_N,
    num_rows,
    hidden_size,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = sum over m of x[m] * weight[n, m] (+ bias[n]), in float32.

    x_M [M] contiguous; planes of a weight [N, M]; out_N [N], bias_N [N] any float. A step has WORDS
    of codes.
    """
    STEP: tl.constexpr = WORDS * parts_of(FORMAT)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    safe = tl.where(is_row, row, 0)
    every = tl.full([1, 1], True, tl.int1)
    # Codes are written by no kernel: the first of them travel while the last kernel ends, and those
    # of the next step while one is summed. Of smaller codes there is no room for so many.
    IS_EARLY: tl.constexpr = parts_of(FORMAT) == 2
    if IS_EARLY:
        words, high = words_of(planes, safe[:, None], every, 0, hidden_size, WORDS, FORMAT)
    wait_turn(OVERLAP)
    total = tl.zeros([BLOCK_N, WORDS // CHUNK], tl.float32)
    x_row = x_M + tl.zeros([1, 1], tl.int64)
    for start in range(0, hidden_size, STEP):
        if IS_EARLY:
            following = words_of(
                planes, safe[:, None], every, start + STEP, hidden_size, WORDS, FORMAT
            )
            total = sums_of_words(
                *(total, words, high, planes, safe[:, None], x_row, every),
                *(start, hidden_size, WORDS, FORMAT),
            )
            words, high = following
        else:
            total = sums_packed(
                total, planes, safe[:, None], x_row, every, start, hidden_size, WORDS, FORMAT
            )
    out = scaled_rows(tl.sum(total, 1), planes, safe.to(tl.int64), FORMAT)
    if HAS_BIAS:
        out += tl.load(bias_N + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_N + row, out.to(out_N.dtype.element_ty), mask=is_row)


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def packed_product_kernel(
    x_TM,
    sums_GT,
    planes,
    bias_N,
    out_TN,
    num_tokens,
    num_rows,
    hidden_size,
    out_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m], in rising m, (+ bias[n]).

    x_TM [T, M] contiguous, sums_GT its `group_sums`, planes of a weight [N, M], out_TN [T, N] with
    a row stride, bias_N [N] any float. EVEN_K: rows of the weight have no columns beyond M.
    """
    row_block, column_block = tile_of_program(
        tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_N), GROUP
    )
    wait_turn(OVERLAP)
    token = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = token < num_tokens, column < num_rows
    safe_token = tl.where(is_token, token, 0)
    total = packed_rows(
        *(x_TM, sums_GT, planes, safe_token, is_token, num_tokens),
        *(tl.where(is_column, column, 0), hidden_size),
        *(BLOCK_K, STAGES, EVEN_K, COMPUTE, FORMAT),
    ).T
    if HAS_BIAS:
        total += tl.load(bias_N + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out = out_TN + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    is_out = is_token[:, None] & is_column[None, :]
    tl.store(out, total.to(out_TN.dtype.element_ty), mask=is_out)


@launchable
@triton.jit
def unpack_kernel(
    planes,
    ids,
    out_NM,
    num_rows,
    hidden_size,
    WORDS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = row n of a packed weight, or row ids[n] (int32; NaN for one that is not there)."""
    wait_turn(OVERLAP)
    place = tl.program_id(0).to(tl.int64)
    row = place
    if HAS_IDS:
        row = tl.load(ids + place).to(tl.int64)
    is_known = (row >= 0) & (row < num_rows)
    row = tl.where(is_known, row, 0)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    count = num_words(hidden_size, FORMAT)
    words = tl.load(planes[0] + row * count + word, mask=word < count, other=0)
    high = words
    if high_of(FORMAT) > 0:
        at = planes[3] + row * num_high_words(hidden_size, FORMAT) + high_word(word, FORMAT)
        high = tl.load(at, mask=word < count, other=0)
    for part in tl.static_range(parts_of(FORMAT)):
        column = columns_of(word, FORMAT) + part * RUN
        is_in = (word < count) & (column < hidden_size)
        safe, sub = tl.where(is_in, column, 0), word // RUN % runs_of(FORMAT)
        value = value_packed(planes, words, high, row, safe, part, sub, FORMAT)
        value = tl.where(is_known, value, float("nan"))
        at = out_NM + place * hidden_size + column
        tl.store(at, value.to(out_NM.dtype.element_ty), mask=is_in)


@launchable
@triton.jit
def unpack_tiles_kernel(
    planes,
    out_NM,
    num_rows,
    hidden_size,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = row n of a packed weight: BLOCK_N rows, BLOCKS times BLOCK_K columns a program."""
    wait_turn(OVERLAP)
    COLUMNS: tl.constexpr = RUN * parts_of(FORMAT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = (row < num_rows)[:, None]
    at = packed_at(planes, tl.where(is_row, row[:, None], 0), hidden_size, RUN, FORMAT)
    begin = tl.program_id(1) * (BLOCKS * BLOCK_K)
    for first in range(begin, tl.minimum(begin + BLOCKS * BLOCK_K, hidden_size), BLOCK_K):
        raw = block_scales(planes, at, first, BLOCK_K, FORMAT)
        for one in tl.static_range(BLOCK_K // COLUMNS):
            start = first + one * COLUMNS
            values = values_at(
                *(at, raw, start, one, one * COLUMNS // group_of(FORMAT)),
                *(BLOCK_K, COMPUTE, FORMAT),
            )
            column = start + tl.arange(0, COLUMNS)[None, :]
            out = out_NM + row[:, None] * hidden_size + column
            is_in = is_row & (column < hidden_size)
            tl.store(out, values.to(out_NM.dtype.element_ty), mask=is_in)


def packed_matvec(
    x_TM: Tensor,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: SumsShape,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, for one row of x."""
    num_rows, hidden_size = len(planes.codes), x_TM.shape[1]
    assert out_TN.shape == (1, num_rows)
    assert x_TM.shape[0] == 1
    assert x_TM.stride(1) == 1
    packed_matvec_kernel[(cdiv(num_rows, shape.block_n),)](
        x_TM,
        planes.arguments(),
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_rows,
        hidden_size,
        BLOCK_N=shape.block_n,
        WORDS=shape.words,
        HAS_BIAS=bias_N is not None,
        FORMAT=layout.name,
        num_warps=shape.num_warps,
        **launch_options(out_TN.device),
    )


def packed_product(
    x_TM: Tensor,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: PackedShape,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided."""
    num_tokens, hidden_size = x_TM.shape
    num_rows = len(planes.codes)
    assert out_TN.shape == (num_tokens, num_rows)
    assert x_TM.is_contiguous()
    if num_tokens == 0:
        return
    grid = cdiv(num_tokens, shape.block_t) * cdiv(num_rows, shape.block_n)
    packed_product_kernel[(grid,)](
        x_TM,
        group_sums(x_TM, layout),
        planes.arguments(),
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_tokens,
        num_rows,
        hidden_size,
        out_TN.stride(0),
        BLOCK_T=shape.block_t,
        BLOCK_N=shape.block_n,
        **block_constants(layout, shape.block_k, hidden_size),
        STAGES=shape.num_stages,
        GROUP=16,
        HAS_BIAS=bias_N is not None,
        COMPUTE=TL_DTYPES[x_TM.dtype],
        FORMAT=layout.name,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **launch_options(out_TN.device),
    )


def unpack(
    planes: Planes,
    layout: PlaneLayout,
    cols: int,
    dtype: torch.dtype,
    ids: Tensor | None = None,
    out_NM: Tensor | None = None,
) -> Tensor:
    """Returns the rows of a packed weight as numbers, all or those of `ids` int32; in `out_NM`, if
    there is one."""
    count = len(planes.codes) if ids is None else len(ids)
    out = out_NM
    if out is None:
        out = torch.empty((count, cols), dtype=dtype, device=planes.codes.device)
    if not count:
        return out
    if ids is None and layout.group and layout.factor != "row":
        _unpack_tiles(planes, layout, cols, out)
        return out
    words = min(1024, next_power_of_2(layout.words(cols)))
    unpack_kernel[(count, cdiv(layout.words(cols), words))](
        planes.arguments(),
        out if ids is None else ids,
        out,
        len(planes.codes),
        cols,
        WORDS=words,
        HAS_IDS=ids is not None,
        FORMAT=layout.name,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


def _unpack_tiles(planes: Planes, layout: PlaneLayout, cols: int, out_NM: Tensor) -> None:
    blocks = max(1, 1024 // layout.unit)
    unpack_tiles_kernel[(cdiv(len(out_NM), 32), cdiv(cols, blocks * layout.unit))](
        planes.arguments(),
        out_NM,
        len(out_NM),
        cols,
        BLOCK_N=32,
        BLOCK_K=layout.unit,
        BLOCKS=blocks,
        COMPUTE=TL_DTYPES[out_NM.dtype],
        FORMAT=layout.name,
        num_warps=4,
        **launch_options(out_NM.device),
    )
