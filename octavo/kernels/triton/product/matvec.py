"""Products with one row: programs sum a few rows of the weight in registers, no tensor cores.

Called by `choose.py` for steps of one token; `experts/pairs.py` is alike. Never where batch
invariance was promised: a row's bits differ from those that `linear.py` gives it in a larger batch.

Such a step reads weights and does little else. `tl.dot` sends them through shared memory, about one
program a multiprocessor; here several programs a multiprocessor wait for 16-byte loads at once.

Shape legend: M columns of the weight, N rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.product.shapes import RowsShape
from octavo.kernels.triton.tiles.weight import folded, weight_at, weight_tile


@launchable
@triton.jit
def matvec_kernel(
    x_M,
    weight_NM,
    bias_N,
    out_N,
    num_rows,
    hidden_size,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = sum over m of x[m] * weight[n, m] (+ bias[n]), in float32.

    x_M [M] contiguous, weight_NM [N, M] with a row stride, out_N [N], bias_N [N] any float.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = row < num_rows
    safe = tl.where(is_row, row, 0)[:, None]
    w_at = weight_at((weight_NM,), safe, weight_stride, k[None, :], FORMAT)
    # Weights are written by no kernel: the first of them travel while the last kernel ends.
    w = weight_tile(w_at, 0, (k < hidden_size)[None, :], FORMAT, False)
    wait_turn(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        left = hidden_size - start
        x = tl.load(x_M + start + k, mask=k < left, other=0.0)
        is_next = (k < left - BLOCK_K)[None, :]
        following = weight_tile(w_at, start, is_next, FORMAT, False, BLOCK_K)
        total += folded(w, x[None, :])
        w = following
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias_N + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_N + row, out.to(out_N.dtype.element_ty), mask=is_row)


def matvec(
    x_TM: Tensor, weight_NM: Tensor, bias_N: Tensor | None, out_TN: Tensor, shape: RowsShape
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, for one row of x."""
    num_rows, hidden_size = weight_NM.shape
    assert x_TM.shape == (1, hidden_size)
    assert out_TN.shape == (1, num_rows)
    assert x_TM.stride(1) == 1 or hidden_size == 1
    assert out_TN.stride(1) == 1 or num_rows == 1
    assert weight_NM.stride(1) == 1 or hidden_size == 1
    matvec_kernel[(cdiv(num_rows, shape.block_n),)](
        x_TM,
        weight_NM,
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_rows,
        hidden_size,
        weight_NM.stride(0),
        **shape.constants(),
        HAS_BIAS=bias_N is not None,
        FORMAT="numbers",
        **launch_options(out_TN.device),
    )
