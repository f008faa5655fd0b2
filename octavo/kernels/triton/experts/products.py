"""One tile of an expert's products: rows of some tokens, columns of one expert.

Called by the kernels of `grouped.py`. Rows are those of `rows.py`: pairs, tokens, rows in hidden
and in parts, and which of them are some.

Shape legend: T tokens, M hidden, F expert hidden, R rows of hidden or of parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.activation import gated
from octavo.kernels.triton.tiles.packed import packed_pair_of_rows, packed_rows
from octavo.kernels.triton.tiles.weight import stacked_tile, weight_at, weight_tile


@triton.jit
def gate_up_rows(
    x_TM,
    sums_GT,
    num_tokens,
    gate_FM,
    up_FM,
    gate_bias_EF,
    up_bias_EF,
    hidden_RF,
    hidden_size,
    inner_size,
    expert,
    first_column,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """hidden[row] = act(x[token] @ gate.T, x[token] @ up.T) in BLOCK_N columns of one expert, its
    biases added to both products (HAS_BIAS), for the rows that are some; TMA: gate and up are
    descriptors of all experts. Packed ones are planes of all, sums the `group_sums` of x."""
    _, token, row, _, is_row = rows
    column = first_column + tl.arange(0, BLOCK_N)
    safe_token = tl.where(is_row, token, 0)
    if FORMAT == "numbers":
        x_rows = x_TM + safe_token.to(tl.int64)[:, None] * hidden_size
        gate, up = _gate_up_of_numbers(
            *(x_rows, gate_FM, up_FM, hidden_size, inner_size, expert, first_column, is_row),
            *(BLOCK_N, BLOCK_K, TMA, EVEN_K, COMPUTE, FORMAT),
        )
    else:
        of_weight = expert.to(tl.int64) * inner_size + tl.where(column < inner_size, column, 0)
        gate_T, up_T = packed_pair_of_rows(
            *(x_TM, sums_GT, gate_FM, up_FM, safe_token, is_row, num_tokens, of_weight),
            *(hidden_size, BLOCK_K, STAGES, EVEN_K, COMPUTE, FORMAT),
        )
        gate, up = gate_T.T, up_T.T
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * inner_size + column
        gate += tl.load(gate_bias_EF + bias_at, mask=column < inner_size, other=0.0)[None, :]
        up += tl.load(up_bias_EF + bias_at, mask=column < inner_size, other=0.0)[None, :]
    value = gated(gate, up, ACTIVATION)
    out = hidden_RF + row.to(tl.int64)[:, None] * inner_size + column[None, :]
    is_out = is_row[:, None] & (column < inner_size)[None, :]
    tl.store(out, value.to(hidden_RF.dtype.element_ty), mask=is_out)


@triton.jit
def _gate_up_of_numbers(
    x_rows,
    gate_FM,
    up_FM,
    hidden_size,
    inner_size,
    expert,
    first_column,
    is_row,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns the products of x with gate and up, an expert's or, with TMA, descriptors of all."""
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_rows + k[None, :]
    if not TMA:
        safe = tl.where(column < inner_size, column, 0)[None, :]
        gate_at = weight_at((gate_FM,), safe, hidden_size, k[:, None], FORMAT)
        up_at = weight_at((up_FM,), safe, hidden_size, k[:, None], FORMAT)
    gate = tl.zeros([is_row.shape[0], BLOCK_N], tl.float32)
    up = tl.zeros([is_row.shape[0], BLOCK_N], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        is_k = k < hidden_size - start
        is_in = is_row[:, None] if EVEN_K else is_row[:, None] & is_k[None, :]
        x = tl.load(x_at + start, mask=is_in, other=0.0)
        if TMA:
            g = stacked_tile(gate_FM, expert, first_column, start, BLOCK_N, BLOCK_K)
            u = stacked_tile(up_FM, expert, first_column, start, BLOCK_N, BLOCK_K)
        else:
            g = weight_tile(gate_at, start, is_k[:, None], FORMAT, EVEN_K)
            u = weight_tile(up_at, start, is_k[:, None], FORMAT, EVEN_K)
        x = x.to(COMPUTE)
        gate = tl.dot(x, g.to(COMPUTE), gate, input_precision="ieee")
        up = tl.dot(x, u.to(COMPUTE), up, input_precision="ieee")
    return gate, up


@triton.jit
def down_rows(
    hidden_RF,
    sums_GR,
    num_rows,
    down_MF,
    parts_RM,
    hidden_size,
    inner_size,
    down_stride,
    expert,
    first_column,
    first,
    rows,
    weight,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """parts[part] = weight * hidden[row] @ down.T in BLOCK_N columns of one expert, whose rows are
    down_stride apart, for the rows that are some; TMA: hidden and down are descriptors, and rows
    follow each other from first on. Packed ones are planes of all, sums the `group_sums` of hidden,
    which has num_rows."""
    _, _, row, part, is_row = rows
    column = first_column + tl.arange(0, BLOCK_N)
    if FORMAT == "numbers":
        total = _down_of_numbers(
            *(hidden_RF, down_MF, hidden_size, inner_size, down_stride, expert, first_column),
            *(first, row, is_row, BLOCK_N, BLOCK_K, TMA, EVEN_K, COMPUTE, FORMAT),
        )
    else:
        of_weight = expert.to(tl.int64) * hidden_size + tl.where(column < hidden_size, column, 0)
        total = packed_rows(
            *(hidden_RF, sums_GR, down_MF, tl.where(is_row, row, 0), is_row, num_rows),
            *(of_weight, inner_size, BLOCK_K, STAGES, EVEN_K, COMPUTE, FORMAT),
        ).T
    total *= weight[:, None]
    out = parts_RM + part.to(tl.int64)[:, None] * hidden_size + column[None, :]
    is_out = is_row[:, None] & (column < hidden_size)[None, :]
    tl.store(out, total.to(parts_RM.dtype.element_ty), mask=is_out)


@triton.jit
def _down_of_numbers(
    hidden_RF,
    down_MF,
    hidden_size,
    inner_size,
    down_stride,
    expert,
    first_column,
    first,
    row,
    is_row,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Returns the products of hidden with down, an expert's or, with TMA, descriptors."""
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        safe_row = tl.where(is_row, row, 0).to(tl.int64)
        hidden_at = hidden_RF + safe_row[:, None] * inner_size + k[None, :]
        safe = tl.where(column < hidden_size, column, 0)[None, :]
        down_at = weight_at((down_MF,), safe, down_stride, k[:, None], FORMAT)
    total = tl.zeros([row.shape[0], BLOCK_N], tl.float32)
    for start in range(0, inner_size, BLOCK_K):
        if TMA:
            h = hidden_RF.load([first, start])
            w = stacked_tile(down_MF, expert, first_column, start, BLOCK_N, BLOCK_K)
        else:
            is_k = k < inner_size - start
            is_in = is_row[:, None] if EVEN_K else is_row[:, None] & is_k[None, :]
            h = tl.load(hidden_at + start, mask=is_in, other=0.0)
            w = weight_tile(down_at, start, is_k[:, None], FORMAT, EVEN_K)
        total = tl.dot(h.to(COMPUTE), w.to(COMPUTE), total, input_precision="ieee")
    return total
