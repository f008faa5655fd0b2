"""A dense product of fixed order: row t has the same bits whatever the other rows are, but for
plans that split the sum (`ProductPlan.in_one_order` takes that out).

Called by `backend.py` where the vendor's product is slower, or would not be batch invariant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.experts.moe import TL_DTYPES, tile_of_program
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last, make_tickets

FEW_ROWS = 512
"""Of a weight: too few for all processors, unless they share its columns too."""


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
        safe = tl.where(column < num_rows, column, 0).to(tl.int64)
        token = tl.where(is_row, row, 0).to(tl.int64)
        x_at = x_TM + token[:, None] * hidden_size + k[None, :]
        w_at = weight_NM + safe[None, :] * weight_stride + k[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    begin = 0
    end = hidden_size
    if SPLITS > 1:
        size = tl.cdiv(tl.cdiv(hidden_size, SPLITS), BLOCK_K) * BLOCK_K
        begin = tl.program_id(1) * size
        end = tl.minimum(begin + size, hidden_size)
    for start in range(begin, end, BLOCK_K):
        left = hidden_size - start
        if TMA:
            x = x_TM.load([row_block * BLOCK_T, start])
            w = weight_NM.load([column_block * BLOCK_N, start]).T
        elif EVEN_K:
            x = tl.load(x_at + start)
            w = tl.load(w_at + start)
        else:
            x = tl.load(x_at + start, mask=(k < left)[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(k < left)[:, None], other=0.0)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductPlan:
    """The launch shape of a dense product."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    splits: int = 1
    """Parts of the sum, which change its bits."""

    def of_floats(self) -> ProductPlan:
        """Returns the plan for float32: blocks of as many bytes."""
        return replace(self, block_k=self.block_k // 2)

    def in_one_order(self) -> ProductPlan:
        """Returns the plan whose sums have the bits that every number of tokens gives."""
        return replace(self, splits=1)


def plan_product(num_tokens: int, num_rows: int, *, can_tma: bool) -> ProductPlan:
    """Returns the launch shape: measured on an H100, whose 227 KiB of shared memory it wants.

    Few tokens: columns narrow enough to give every multiprocessor work; a router's few rows are
    split. Bits depend on nothing else.
    """
    block_t = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    splits = 4 if num_tokens <= 64 and num_rows <= FEW_ROWS else 1
    if splits > 1:
        block_n, block_k, num_stages = 16, 128, 6
    elif num_rows <= (2048 if block_t == 64 else 4096):
        block_n, block_k, num_stages = (16, 256, 5) if block_t == 64 else (16, 512, 4)
    elif num_rows <= 4096 or (block_t == 16 and num_rows <= 16384):
        block_n, block_k, num_stages = 32, 128, 5
    elif num_rows > (8192 if block_t == 64 else 16384):
        block_n, block_k, num_stages = 128, 128, 4
    else:
        block_n, block_k, num_stages = 64, 128, 4
    if num_tokens > 64:
        if -(-num_tokens // 128) * -(-num_rows // 128) >= 132:
            return ProductPlan(
                block_t=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=can_tma
            )
        block_n, block_k, num_stages = 64, 128, 4
    return ProductPlan(
        block_t=block_t,
        block_n=block_n,
        block_k=block_k,
        num_warps=4,
        num_stages=num_stages,
        tma=False,
        splits=splits,
    )


def product(
    x_TM: Tensor,
    weight_NM: Tensor,
    bias_N: Tensor | None,
    out_TN: Tensor,
    plan: ProductPlan,
    tickets: Tensor | None = None,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided. `tickets`: see
    `make_tickets`; for plans that split the sum."""
    num_tokens, hidden_size = x_TM.shape
    num_rows = weight_NM.shape[0]
    assert out_TN.shape == (num_tokens, num_rows)
    assert weight_NM.shape[1] == hidden_size
    assert x_TM.is_contiguous()
    assert out_TN.stride(1) == 1 or num_rows == 1
    assert weight_NM.stride(1) == 1 or hidden_size == 1
    if num_tokens == 0:
        return
    is_same = x_TM.dtype == weight_NM.dtype
    grid = cdiv(num_tokens, plan.block_t) * cdiv(num_rows, plan.block_n)
    parts = x_TM
    if plan.splits > 1:
        parts = x_TM.new_empty((plan.splits, num_tokens, num_rows), dtype=torch.float32)
        tickets = make_tickets(x_TM.device) if tickets is None else tickets
        assert grid <= len(tickets), (grid, len(tickets))
    product_kernel[(grid, plan.splits)](
        _tiles(x_TM, plan.block_t, plan),
        _tiles(weight_NM, plan.block_n, plan),
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_tokens,
        num_rows,
        hidden_size,
        weight_NM.stride(0),
        out_TN.stride(0),
        parts,
        x_TM if tickets is None else tickets,
        BLOCK_T=plan.block_t,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        GROUP=16,
        SPLITS=plan.splits,
        HAS_BIAS=bias_N is not None,
        TMA=plan.tma,
        EVEN_K=hidden_size % plan.block_k == 0,
        COMPUTE=TL_DTYPES[x_TM.dtype] if is_same else tl.float32,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **launch_options(out_TN.device),
    )


def _tiles(matrix: Tensor, rows: int, plan: ProductPlan) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, plan.block_k]) if plan.tma else matrix
