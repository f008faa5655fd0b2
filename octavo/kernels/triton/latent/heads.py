"""Products of heads: queries into the latent vectors' space, and results out of it.

Called by choose.py, and within write.py's kernel. Every head has a weight of its own; they are read
once by few tokens, so that they are what a product waits for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn

FEW_TOKENS = 64
"""Up to here a product for each head is bound by its weights; more are the vendor's."""


class HeadShape(NamedTuple):
    """The tile of a program: tokens, columns, and what it sums at once."""

    block_t: int
    block_n: int
    block_k: int


def head_shape(
    num_tokens: int, depth: int, columns: int, itemsize: int, *, is_invariant: bool = False
) -> HeadShape:
    """Returns the tile: columns narrow enough to give every multiprocessor of an H100 work, and the
    weight's whole depth, where registers hold it."""
    block_t = 16 if is_invariant or num_tokens <= 16 else 32
    whole = min(512 if itemsize == 2 else 64, max(16, next_power_of_2(depth)))
    block_n = 16 if whole > 128 else 64
    return HeadShape(block_t, min(block_n, max(16, next_power_of_2(columns))), whole)


@triton.jit
def head_tile(
    operands, program, K: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ANNOUNCES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Tile `program` of out[t, h, n] = sum_k x[t, h, k] weight[h, k, n]: BLOCK_T tokens of BLOCK_N
    columns of a head; columns of x and out lie side by side. `operands`: those of `head_arguments`,
    strides together. Takes its turn by itself: weights are written by no kernel."""
    x, weight, out, num_tokens, strides = operands
    stride_x, stride_xh, stride_w, stride_wk, stride_wn, stride_out, stride_oh = strides
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(num_tokens, BLOCK_T)
    head = (program // (COLUMNS * blocks)).to(tl.int64)
    n = program // blocks % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = (t < num_tokens)[:, None]
    k = tl.arange(0, BLOCK_K)
    w_at = weight + head * stride_w + k[:, None] * stride_wk + n[None, :] * stride_wn
    x_at = x + t[:, None] * stride_x + head * stride_xh + k[None, :]
    w = tl.load(w_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
    wait_turn(OVERLAP)
    announce(ANNOUNCES and OVERLAP)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x_tile = tl.load(x_at + start, mask=here & (k < K - start)[None, :], other=0.0)
        acc = tl.dot(x_tile, w.to(x_tile.dtype), acc, input_precision="ieee")
        if start + BLOCK_K < K:
            ahead = start + BLOCK_K
            is_in = (k < K - ahead)[:, None] & (n < N)[None, :]
            w = tl.load(w_at + ahead * stride_wk, mask=is_in, other=0.0)
    at = out + t[:, None] * stride_out + head * stride_oh + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here & (n < N)[None, :])


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def _head_product_kernel(
    x, weight, out, num_tokens, stride_x, stride_xh, stride_w, stride_wk, stride_wn, stride_out,
    stride_oh, K: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`head_tile` number `program 0`."""
    strides = (stride_x, stride_xh, stride_w, stride_wk, stride_wn, stride_out, stride_oh)
    operands = (x, weight, out, num_tokens, strides)
    head_tile(operands, tl.program_id(0), K, N, BLOCK_T, BLOCK_N, BLOCK_K, False, OVERLAP)


def head_arguments(x_THK: Tensor, weight_HKN: Tensor, out_THN: Tensor) -> tuple[Tensor | int, ...]:
    """Returns what a kernel makes the operands of `head_tile` of: tensors, tokens, strides."""
    assert x_THK.stride(2) == out_THN.stride(2) == 1
    return (
        *(x_THK, weight_HKN, out_THN, len(x_THK)),
        *(x_THK.stride(0), x_THK.stride(1), *weight_HKN.stride()),
        *(out_THN.stride(0), out_THN.stride(1)),
    )


def head_product(
    x_THK: Tensor,
    weight_HKN: Tensor,
    out_THN: Tensor,
    *,
    is_invariant: bool = False,
    shape: HeadShape | None = None,
) -> None:
    """Writes x[t, h] @ weight[h] to `out`; columns of x and `out` lie side by side.

    Few tokens, and with `is_invariant` all, are added up in an order that depends on no other
    token; more go to the vendor's batched product.
    """
    num_tokens, num_heads, depth = x_THK.shape
    columns = weight_HKN.shape[2]
    if num_tokens == 0:
        return
    if num_tokens > FEW_TOKENS and not is_invariant and shape is None:
        torch.bmm(x_THK.transpose(0, 1), weight_HKN, out=out_THN.transpose(0, 1))
        return
    block_t, block_n, block_k = shape or head_shape(
        *(num_tokens, depth, columns, x_THK.element_size()), is_invariant=is_invariant
    )
    _head_product_kernel[(num_heads * cdiv(columns, block_n) * cdiv(num_tokens, block_t),)](
        *head_arguments(x_THK, weight_HKN, out_THN),
        K=depth,
        N=columns,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        **launch_options(x_THK.device),
    )
