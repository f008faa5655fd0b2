"""Tiles of weights: the one place that knows how a format lies in memory.

Called by every loop that multiplies with a weight. A weight is its planes, a tuple of pointers:
FORMAT "numbers" has one, of floats. Another format is a branch in `weight_at` and `weight_tile`,
whose planes are pointers more (codes, scales, zeros), and which returns floats all the same.

Rows and columns are index tensors that broadcast to the tile: [N, 1] and [1, K] for sums in
registers, [1, N] and [K, 1] for `tl.dot`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_at(planes, row, row_stride, k, FORMAT: tl.constexpr):
    """Returns, for each plane, where the numbers `k` of rows `row` lie, which are row_stride
    numbers apart."""
    tl.static_assert(FORMAT == "numbers")
    return (planes[0] + (row.to(tl.int64) * row_stride + k),)


@triton.jit
def weight_tile(
    at, start, is_in, FORMAT: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr = 0
):
    """Returns the tile `start` and AHEAD numbers along the rows from `at`; 0 where it is not in.
    EVEN_K: all of it is."""
    tl.static_assert(FORMAT == "numbers")
    there = at[0] + start + AHEAD  # a constant of its own costs no register
    return tl.load(there) if EVEN_K else tl.load(there, mask=is_in, other=0.0)


@triton.jit
def stacked_tile(stack, matrix, row, start, N: tl.constexpr, K: tl.constexpr):
    """Returns the tile [K, N] of a matrix of a stack, a descriptor of blocks [1, N, K]."""
    return stack.load([matrix, row, start]).reshape(N, K).T


@triton.jit
def folded(w, x):
    """Sums of 8 neighbours of w * x: what one thread holds of a 16-byte load of 16-bit numbers."""
    products = w.to(tl.float32) * x.to(tl.float32)
    return tl.sum(products.reshape(*w.shape[:-1], w.shape[-1] // 8, 8), len(w.shape))
