"""Blocks whose codes point into a grid, or are ternary, made numbers: ggml's IQ1 to IQ3 and TQ.

Called by `matrices.py`, `backend.py` and the experts. A device keeps such rows as their file has
them, and makes numbers of a matrix for each product with it. Values are bit for bit those of the
package `gguf`. A block has 256 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.formats import GGUF_FORMATS
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.weights import Weight

BLOCK = tl.constexpr(256)
_ROWS = 4


@triton.constexpr_function
def _bytes_of(format: str) -> int:
    return GGUF_FORMATS[format].block_bytes


@triton.jit
def _byte(at, index):
    return tl.load(at + index).to(tl.int32)


@triton.jit
def _short(at, index):
    return _byte(at, index) | (_byte(at, index + 1) << 8)


@triton.jit
def _word(at, index):
    return _short(at, index) | (_short(at, index + 2) << 16)


@triton.jit
def _half(bits):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(at, index):
    """Returns half number `index` of bytes, low ones first."""
    return (_byte(at, index // 2) >> (4 * (index % 2))) & 15


@triton.jit
def _sign(signs, place):
    """Returns -1 or 1 for the bit `place` of 8, of which the last makes their sum even."""
    folded = signs ^ (signs >> 4)
    folded = folded ^ (folded >> 2)
    last = (folded ^ (folded >> 1)) & 1
    bit = tl.where(place == 7, last, (signs >> place) & 1)
    return 1.0 - 2.0 * bit.to(tl.float32)


@triton.jit
def _whole_sign(signs, place):
    return 1.0 - 2.0 * ((signs >> place) & 1).to(tl.float32)


@triton.jit
def _of_grid_2(at, grid, e, FORMAT: tl.constexpr):
    eight, place = e // 8, e % 8
    scale = _half(_short(at, 0))
    if FORMAT == "iq2_xxs":
        index = _byte(at, 2 + e // 32 * 8 + eight % 4)
        more = _word(at, 6 + e // 32 * 8)
        sign = _sign((more >> (7 * (eight % 4))) & 127, place)
        step = (more >> 28) & 15
    elif FORMAT == "iq2_xs":
        code = _short(at, 2 + 2 * eight)
        index = code & 511
        sign = _sign(code >> 9, place)
        step = _nibble(at + 66, e // 16)
    else:
        above = (_byte(at, 66 + e // 32) >> (2 * (eight % 4))) & 3
        index = _byte(at, 2 + eight) | (above << 8)
        sign = _whole_sign(_byte(at, 34 + eight), place)
        step = _nibble(at + 74, e // 16)
    scale = scale * (0.5 + step.to(tl.float32)) * 0.25
    return scale * tl.load(grid + index * 8 + place) * sign


@triton.jit
def _of_grid_3(at, grid, e, FORMAT: tl.constexpr):
    four, eight, place = e // 4, e // 8, e % 8
    scale = _half(_short(at, 0))
    index = _byte(at, 2 + four)
    if FORMAT == "iq3_xxs":
        more = _word(at, 66 + e // 32 * 4)
        sign = _sign((more >> (7 * (eight % 4))) & 127, place)
        scale = scale * (0.5 + ((more >> 28) & 15).to(tl.float32)) * 0.5
    else:
        index |= ((_byte(at, 66 + e // 32) >> (four % 8)) & 1) << 8
        sign = _whole_sign(_byte(at, 74 + eight), place)
        scale = scale * (1 + 2 * _nibble(at + 106, e // 32)).to(tl.float32)
    return scale * tl.load(grid + index * 4 + e % 4) * sign


@triton.jit
def _of_grid_1(at, grid, e, FORMAT: tl.constexpr):
    eight, place = e // 8, e % 8
    if FORMAT == "iq1_s":
        more = _short(at, 34 + e // 32 * 2)
        scale, step = _half(_short(at, 0)), (more >> 12) & 7
        index = _byte(at, 2 + eight) | (((more >> (3 * (eight % 4))) & 7) << 8)
        is_below = (more >> 15) & 1
    else:
        bits = (_short(at, 48) >> 12) | ((_short(at, 50) >> 8) & 0xF0)
        bits |= ((_short(at, 52) >> 4) & 0xF00) | (_short(at, 54) & 0xF000)
        sixteen = e // 16
        step = (_short(at, 48 + sixteen // 4 * 2) >> (3 * (sixteen % 4))) & 7
        scale, more = _half(bits), _nibble(at + 32, eight)
        index = _byte(at, eight) | ((more & 7) << 8)
        is_below = more >> 3
    scale *= (2 * step + 1).to(tl.float32)
    delta = tl.where(is_below > 0, -0.125, 0.125)
    return scale * (tl.load(grid + index * 8 + place) + delta)


@triton.jit
def _ternary(at, e, FORMAT: tl.constexpr):
    if FORMAT == "tq2_0":
        code = (_byte(at, e // 128 * 32 + e % 32) >> (e // 32 % 4 * 2)) & 3
        scale = _half(_short(at, 64))
    else:
        is_first, is_last = e < 160, e >= 240
        place = tl.where(is_first, e % 32, tl.where(is_last, 48 + e % 4, 32 + e % 16))
        number = tl.where(is_first, e // 32, tl.where(is_last, (e - 240) // 4, (e - 160) // 16))
        factor = tl.where(number == 0, 1, tl.where(number == 1, 3, tl.where(number == 2, 9, 27)))
        factor = tl.where(number == 4, 81, factor)
        code = (((_byte(at, place) * factor) & 255) * 3) >> 8
        scale = _half(_short(at, 52))
    return scale * (code - 1).to(tl.float32)


@launchable
@triton.jit
def unpack_blocks_kernel(
    rows_NB,
    grid,
    ids,
    out_NM,
    num_out,
    num_rows,
    rows_each,
    hidden_size,
    ROWS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = row n; or for ids int32, row n % rows_each of matrix ids[n // rows_each], NaN where
    there is no such row. rows_NB uint8; a program has ROWS rows of a block."""
    wait_turn(OVERLAP)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_out = place < num_out
    row = place
    if HAS_IDS:
        matrix = tl.load(ids + place // rows_each, mask=is_out, other=0).to(tl.int64)
        row = tl.where(matrix >= 0, matrix * rows_each + place % rows_each, -1)
    is_known = is_out & (row >= 0) & (row < num_rows)
    block = tl.program_id(1)
    first = tl.where(is_known, row, 0) * (hidden_size // BLOCK) + block
    at = rows_NB + first[:, None] * _bytes_of(FORMAT)
    e = tl.arange(0, BLOCK)[None, :]
    if FORMAT == "tq1_0" or FORMAT == "tq2_0":
        value = _ternary(at, e, FORMAT)
    elif FORMAT == "iq1_s" or FORMAT == "iq1_m":
        value = _of_grid_1(at, grid, e, FORMAT)
    elif FORMAT == "iq3_xxs" or FORMAT == "iq3_s":
        value = _of_grid_3(at, grid, e, FORMAT)
    else:
        value = _of_grid_2(at, grid, e, FORMAT)
    value = tl.where(is_known[:, None], value, float("nan"))
    out = out_NM + place[:, None] * hidden_size + block * BLOCK + e
    tl.store(out, value.to(out_NM.dtype.element_ty), mask=is_out[:, None])


def unpack_blocks(
    weight: Weight,
    dtype: torch.dtype,
    ids: Tensor | None = None,
    rows_each: int = 1,
    out_NM: Tensor | None = None,
) -> Tensor:
    """Returns rows of a weight as numbers [N, cols]: all, or the `rows_each` ones of each of the
    matrices `ids` int32, which lie one after the other in it; in `out_NM`, if there is one."""
    count = weight.rows if ids is None else ids.numel() * rows_each
    out = out_NM
    if out is None:
        out = torch.empty((count, weight.cols), dtype=dtype, device=weight.data.device)
    assert weight.data.is_contiguous()
    if not count:
        return out
    unpack_blocks_kernel[(cdiv(count, _ROWS), weight.cols // BLOCK.value)](
        weight.data,
        weight.data if weight.table is None else weight.table,
        weight.data if ids is None else ids,
        out,
        count,
        weight.rows,
        rows_each,
        weight.cols,
        ROWS=_ROWS,
        HAS_IDS=ids is not None,
        FORMAT=weight.format.name,
        num_warps=4,
        **launch_options(out.device),
    )
    return out
