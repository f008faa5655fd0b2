"""A dense product of fixed order: row t has the same bits whatever the other rows are, but for
shapes that split the sum (`ProductShape.in_one_order` takes that out).

Called by `choose.py` where the vendor's product is slower, or would not be batch invariant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.numbers import compute_type
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last, room_for_splits
from octavo.kernels.triton.product.shapes import ProductShape
from octavo.kernels.triton.tiles.grid import tile_of_program
from octavo.kernels.triton.tiles.weight import weight_at, weight_tile


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def product_kernel(
    x_TM,
    weight_NM,
    bias_N,
    out_TN,
    num_tokens,
    num_rows,
    hidden_size,
    weight_stride,
    out_stride,
    parts_STN,
    tickets,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, n] = sum over m of x[t, m] * weight[n, m], in rising m, (+ bias[n]).

    x_TM [T, M] contiguous, weight_NM [N, M] and out_TN [T, N] with row strides, bias_N [N] any
    float. TMA: x and weight are tensor descriptors of blocks [BLOCK_T or BLOCK_N, BLOCK_K]. EVEN_K:
    BLOCK_K divides M. SPLITS > 1: program 1 sums its part of M alone, to parts float32
    [SPLITS, T, N], and the last of a tile adds them in rising order.
    """
    row_block, column_block = tile_of_program(
        tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_N), GROUP
    )
    wait_turn(OVERLAP)
    row = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = row < num_tokens
    if not TMA:
        # Rows and columns that stand for nothing read the first one: cheaper than a mask.
        safe = tl.where(column < num_rows, column, 0)
        token = tl.where(is_row, row, 0).to(tl.int64)
        x_at = x_TM + token[:, None] * hidden_size + k[None, :]
        w_at = weight_at((weight_NM,), safe[None, :], weight_stride, k[:, None], FORMAT)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    begin = 0
    end = hidden_size
    if SPLITS > 1:
        size = tl.cdiv(tl.cdiv(hidden_size, SPLITS), BLOCK_K) * BLOCK_K
        begin = tl.program_id(1) * size
        end = tl.minimum(begin + size, hidden_size)
    for start in range(begin, end, BLOCK_K):
        if TMA:
            x = x_TM.load([row_block * BLOCK_T, start])
            w = weight_NM.load([column_block * BLOCK_N, start]).T
        else:
            is_k = k < hidden_size - start
            if EVEN_K:
                x = tl.load(x_at + start)
            else:
                x = tl.load(x_at + start, mask=is_k[None, :], other=0.0)
            w = weight_tile(w_at, start, is_k[:, None], FORMAT, EVEN_K)
        total = tl.dot(x.to(COMPUTE), w.to(COMPUTE), total, input_precision="ieee")
    is_column = column < num_rows
    if SPLITS > 1:
        part = parts_STN + row.to(tl.int64)[:, None] * num_rows + column[None, :]
        is_part, step = is_row[:, None] & is_column[None, :], num_tokens * num_rows
        tl.store(part + tl.program_id(1) * step, total, mask=is_part)
        if not is_last(tickets + tl.program_id(0), SPLITS):
            return
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(part + split * step, mask=is_part, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        total += tl.load(bias_N + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out = out_TN + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out, total.to(out_TN.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def product(
    x_TM: Tensor,
    weight_NM: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: ProductShape,
    tickets: Tensor | None = None,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided. `tickets`: see
    `make_tickets`; for shapes that split the sum."""
    num_tokens, hidden_size = x_TM.shape
    num_rows = weight_NM.shape[0]
    assert out_TN.shape == (num_tokens, num_rows)
    assert weight_NM.shape[1] == hidden_size
    assert x_TM.is_contiguous()
    assert out_TN.stride(1) == 1 or num_rows == 1
    assert weight_NM.stride(1) == 1 or hidden_size == 1
    if num_tokens == 0:
        return
    grid = cdiv(num_tokens, shape.block_t) * cdiv(num_rows, shape.block_n)
    parts = room_for_splits(x_TM, shape.splits, out_TN.shape, grid, tickets)
    product_kernel[(grid, shape.splits)](
        _tiles(x_TM, shape.block_t, shape),
        _tiles(weight_NM, shape.block_n, shape),
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_tokens,
        num_rows,
        hidden_size,
        weight_NM.stride(0),
        out_TN.stride(0),
        *parts,
        **shape.constants(hidden_size),
        GROUP=16,
        HAS_BIAS=bias_N is not None,
        COMPUTE=compute_type(x_TM, weight_NM),
        FORMAT="numbers",
        **launch_options(out_TN.device),
    )


def _tiles(matrix: Tensor, rows: int, shape: ProductShape) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, shape.block_k]) if shape.tma else matrix
