"""RMSNorm of one row in the product that reads it; for the router, the choice of experts too.

Called by `choose.py` for steps of one token. Every program norms the whole row for itself: that
takes less than a launch. Never where batch invariance was promised (see `matvec.py`).

Shape legend: M hidden, N rows of a weight, E experts, K chosen ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import NormInput, Routed
from octavo.kernels.triton.experts.route import ROUTE_ROWS, route_rows
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.launching.tickets import is_last
from octavo.kernels.triton.product.shapes import RowsShape
from octavo.kernels.triton.tiles.weight import folded, weight_at, weight_tile
from octavo.kernels.weights import Router

MAX_COLUMNS = 8192
"""A program holds the row and its rows of the weight in registers."""


@triton.jit
def normed_row(x_M, residual_M, sum_M, weight, hidden_size, eps, HAS_X: tl.constexpr):
    """Returns y / sqrt(mean(y^2) + eps) * weight, y = residual + x, rounded as in `norm.py`.

    Program 0 stores y to sum_M: the residual itself is still read by the others.
    """
    k = tl.arange(0, weight.shape[0])
    is_in = k < hidden_size
    y = tl.load(residual_M + k, mask=is_in, other=0.0)
    if HAS_X:
        x = tl.load(x_M + k, mask=is_in, other=0.0)
        y = (x.to(tl.float32) + y.to(tl.float32)).to(y.dtype)
        tl.store(sum_M + k, y, mask=is_in & (tl.program_id(0) == 0))
    exact = y.to(tl.float32)
    mean = tl.sum(exact * exact, 0) / hidden_size
    return (exact * tl.rsqrt(mean + eps) * weight.to(tl.float32)).to(y.dtype)


@launchable
@triton.jit
def norm_matvec_kernel(
    x_M,
    residual_M,
    sum_M,
    weight_M,
    hidden_size,
    eps,
    weight_NM,
    weight_stride,
    bias_N,
    out_N,
    num_rows,
    HAS_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = sum over m of normed[m] * weight[n, m] (+ bias[n]), see `normed_row`.

    x, residual, sum, weight_M [M]; weight_NM [N, M] with a row stride; BLOCK_K >= M.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_in = k < hidden_size
    is_row = row < num_rows
    safe = tl.where(is_row, row, 0)[:, None]
    w_at = weight_at((weight_NM,), safe, weight_stride, k[None, :], FORMAT)
    w = weight_tile(w_at, 0, is_in[None, :], FORMAT, False)
    norm = tl.load(weight_M + k, mask=is_in, other=0.0)
    wait_turn(OVERLAP)
    x = normed_row(x_M, residual_M, sum_M, norm, hidden_size, eps, HAS_X)
    out = tl.sum(folded(w, x[None, :]), 1)
    if HAS_BIAS:
        out += tl.load(bias_N + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_N + row, out.to(out_N.dtype.element_ty), mask=is_row)


@launchable
@triton.jit
def norm_route_kernel(
    x_M,
    residual_M,
    sum_M,
    weight_M,
    hidden_size,
    eps,
    weight_NM,
    weight_stride,
    bias_E,
    normed_M,
    logits_N,
    weights_K,
    ids_K,
    counts_E,
    num_live,
    ticket,
    num_experts,
    first_held,
    num_held,
    HAS_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """logits[n] = normed @ weight[n] (+ bias[n]) for row n = program 0; the last program routes
    (`route_rows`).

    x, residual, sum, normed, weight_M [M]; weight_NM [N, M] with a row stride, N >= E; bias [E].
    """
    k = tl.arange(0, BLOCK_K)
    is_in = k < hidden_size
    row = tl.program_id(0)
    w_at = weight_at((weight_NM,), row, weight_stride, k, FORMAT)
    w = weight_tile(w_at, 0, is_in, FORMAT, False)
    norm = tl.load(weight_M + k, mask=is_in, other=0.0)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    x = normed_row(x_M, residual_M, sum_M, norm, hidden_size, eps, HAS_X)
    tl.store(normed_M + k, x, mask=is_in & (row == 0))
    logit = tl.sum(folded(w[None, :], x[None, :]), 1)
    if HAS_BIAS:
        logit += tl.load(bias_E + row, mask=row < num_experts, other=0.0).to(tl.float32)
    tl.store(logits_N + row + tl.arange(0, 1), logit.to(logits_N.dtype.element_ty))
    if is_last(ticket, tl.num_programs(0)):
        route_rows(
            *(0, logits_N, weights_K, ids_K, counts_E, num_live, 1),
            *(num_experts, first_held, num_held, 0),
            *(TOP_K, RENORMALIZE, HAS_PADDING, ROWS, EXPERTS, SLOTS),
        )


def norm_matvec(
    rows: NormInput, weight_NM: Tensor, bias_N: Tensor | None, shape: RowsShape
) -> tuple[Tensor, Tensor]:
    """Returns normed row @ weight.T (+ bias) and the residual, for one row."""
    num_rows, rows = len(weight_NM), rows.summed()
    added = _summed(rows)
    out = added.new_empty((1, num_rows))
    norm_matvec_kernel[(cdiv(num_rows, shape.block_n),)](
        *_arguments(rows, added, weight_NM),
        out if bias_N is None else bias_N,
        out,
        num_rows,
        HAS_X=rows.x_TM is not None,
        HAS_BIAS=bias_N is not None,
        FORMAT="numbers",
        **shape.constants(),
        **launch_options(out.device),
    )
    return out, added


def norm_route(
    rows: NormInput,
    router: Router,
    weight_NM: Tensor,
    counts_E: Tensor,
    num_live: Tensor | None,
    tickets: Tensor,
    *,
    num_warps: int = 4,
) -> Routed:
    """Returns where one row goes; `weight_NM` are the router's weights as one matrix."""
    num_rows, hidden_size = weight_NM.shape
    num_experts = router.weights[0].rows
    assert 0 < router.rule.top_k <= num_experts <= len(counts_E)
    rows = rows.summed()
    added = _summed(rows)
    kind = torch.float32 if router.rule.float32_logits else added.dtype
    normed, logits = torch.empty_like(added), added.new_empty((1, num_rows), dtype=kind)
    weights = added.new_empty((1, router.rule.top_k), dtype=torch.float32)
    ids = added.new_empty((1, router.rule.top_k), dtype=torch.int32)
    norm_route_kernel[(num_rows,)](
        *_arguments(rows, added, weight_NM),
        normed if router.bias_E is None else router.bias_E,
        normed,
        logits,
        weights,
        ids,
        counts_E,
        ids if num_live is None else num_live,
        tickets,
        num_experts,
        *router.held_of(num_experts),
        HAS_X=rows.x_TM is not None,
        HAS_BIAS=router.bias_E is not None,
        BLOCK_K=max(8, next_power_of_2(hidden_size)),
        TOP_K=router.rule.top_k,
        RENORMALIZE=router.rule.renormalize or router.rule.is_softmax_of_chosen,
        HAS_PADDING=num_live is not None,
        ROWS=ROUTE_ROWS,
        EXPERTS=next_power_of_2(num_experts),
        SLOTS=next_power_of_2(router.rule.top_k),
        FORMAT="numbers",
        num_warps=num_warps,
        **launch_options(added.device),
    )
    return Routed(
        x_TM=normed,
        residual_TM=added,
        topk_weights=weights,
        topk_ids=ids,
        gate_T1=logits[:, num_experts:] if num_rows > num_experts else None,
    )


def _summed(rows: NormInput) -> Tensor:
    """Returns where residual + x goes: the residual, if there is no x."""
    return rows.residual_TM if rows.x_TM is None else torch.empty_like(rows.residual_TM)


def _arguments(
    rows: NormInput, added: Tensor, weight_NM: Tensor
) -> tuple[Tensor | int | float, ...]:
    """Returns the row, its norm and the weight, as both kernels take them first."""
    hidden_size = weight_NM.shape[1]
    assert weight_NM.stride(1) == 1 or hidden_size == 1
    assert rows.residual_TM.shape == (1, hidden_size)
    assert rows.x_TM is None or rows.x_TM.shape == (1, hidden_size)
    assert rows.weight_M.shape == (hidden_size,)
    assert hidden_size <= MAX_COLUMNS, (hidden_size, MAX_COLUMNS)
    x = rows.residual_TM if rows.x_TM is None else rows.x_TM
    norm = x, rows.residual_TM, added, rows.weight_M, hidden_size, rows.eps
    return *norm, weight_NM, weight_NM.stride(0)
