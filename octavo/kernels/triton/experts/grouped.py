"""The experts of a MoE layer: products grouped by expert, gate, up and activation in one of them.

Called by `choose.py` for more than a few pairs. One pair of kernels, which find an expert's rows in
two ways (`rows.py`) and have the same bits in both: few pairs are looked through, and a shared
expert whose hidden size is a multiple of the others' runs beside them as that many more; many are
sorted first. Never waits for the device, never adds floats atomically.

Shape legend: T tokens, P pairs (token, choice), E experts, S parts of the shared expert, M hidden,
F expert hidden. R rows of hidden: in the pairs' order; or, where they are looked through, row
t (K + S) + choice for each choice of token t, the parts of the shared expert after its K pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import SHARED_TOKENS, Dispatch, is_few
from octavo.kernels.triton.experts.products import down_rows, gate_up_rows
from octavo.kernels.triton.experts.rows import (
    count_of,
    rows_at,
    rows_of_shared,
    work_of_program,
)
from octavo.kernels.triton.experts.shapes import ExpertsShape, TileShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import (
    SharedParts,
    StackedExperts,
    count_of_shared,
    down_arguments,
    gate_up_arguments,
    has_gate,
)
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.small.group_sums import group_sums
from octavo.kernels.triton.tiles.activation import activation_constant


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def gate_up_kernel(
    x_TM,
    sums_GT,
    gate_EFM,
    up_EFM,
    shared_gate_NM,
    shared_up_NM,
    gate_bias_EF,
    up_bias_EF,
    hidden_RF,
    ids_P,
    order_P,
    blocks_3B,
    num_tokens,
    num_blocks,
    num_experts,
    hidden_size,
    inner_size,
    gate_stride,
    up_stride,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[r] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for every pair of an expert e.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; biases float32 [E, F], HAS_BIAS.
    sums_GT: `group_sums` of x, where packed weights want them.
    ROWS_FROM "order": a program has a block of up to ROWS ordered pairs; HALVES: one that is at
    most half full runs at half height; TMA: gate and up are tensor descriptors of blocks
    [1, BLOCK_N, BLOCK_K]. "scan": it has an expert, ROWS pairs at a time, or one of the SHARED
    parts of the shared expert, whose rows are all tokens. EVEN_K: BLOCK_K divides the length of the
    sum.
    """
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(inner_size, BLOCK_N)
    expert, column, first, end = work_of_program(
        blocks_3B, num_blocks, num_columns, ROWS_FROM, SHARED, GROUP
    )
    if ROWS_FROM == "order" and (expert < 0) | (expert >= num_experts):
        return
    column *= BLOCK_N
    if SHARED > 0 and expert < 0:
        part = expert + SHARED
        skipped = part.to(tl.int64) * inner_size * hidden_size
        gate_up_rows(
            *(x_TM, sums_GT, num_tokens, shared_gate_NM + skipped, shared_up_NM + skipped),
            *(gate_bias_EF, up_bias_EF, hidden_RF, hidden_size, inner_size, expert, column),
            rows_of_shared(part, num_tokens, TOP_K, SHARED, SHARED_ROWS),
            *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, False, ACTIVATION, COMPUTE, FORMAT),
        )
    else:
        if FORMAT == "numbers" and not TMA:
            gate_EFM += expert.to(tl.int64) * gate_stride
            up_EFM += expert.to(tl.int64) * up_stride
        num_pairs = num_tokens * TOP_K
        if ROWS_FROM == "scan":
            count = count_of(expert, ids_P, num_pairs, TILE)
            for start in range(0, count, ROWS):
                gate_up_rows(
                    *(x_TM, sums_GT, num_tokens, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_RF),
                    *(hidden_size, inner_size, expert, column),
                    rows_at(
                        *(start, count, expert, ids_P, order_P, num_pairs),
                        *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                    ),
                    *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
                )
        elif HALVES and end - first <= ROWS // 2:
            gate_up_rows(
                *(x_TM, sums_GT, num_tokens, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_RF),
                *(hidden_size, inner_size, expert, column),
                rows_at(
                    *(first, end, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS // 2, TILE),
                ),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
            )
        else:
            gate_up_rows(
                *(x_TM, sums_GT, num_tokens, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_RF),
                *(hidden_size, inner_size, expert, column),
                rows_at(
                    *(first, end, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                ),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
            )


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def down_kernel(
    hidden_RF,
    half_RF,
    sums_GR,
    down_EMF,
    shared_down_MN,
    shared_gate_T1,
    parts_RM,
    weights_P,
    ids_P,
    order_P,
    blocks_3B,
    num_tokens,
    num_blocks,
    num_experts,
    hidden_size,
    inner_size,
    down_stride,
    shared_stride,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts[p] = weights[p] * hidden[r] @ down[e].T for every pair p of an expert e.

    hidden_RF [R, F]; down [E, M, F] with stride_E given; parts_RM [P, M] in the order of pairs, or
    like hidden where pairs are looked through. The weight of the shared expert's parts is
    sigmoid(shared_gate[t]), or 1. The rest as in `gate_up_kernel`; with TMA hidden is a descriptor
    of [ROWS, BLOCK_K] and half one of [ROWS / 2, BLOCK_K], else they are the same.
    """
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(hidden_size, BLOCK_N)
    expert, column, first, end = work_of_program(
        blocks_3B, num_blocks, num_columns, ROWS_FROM, SHARED, GROUP
    )
    if ROWS_FROM == "order" and (expert < 0) | (expert >= num_experts):
        return
    column *= BLOCK_N
    num_rows = num_tokens * (TOP_K + SHARED)
    if SHARED > 0 and expert < 0:
        rows = rows_of_shared(expert + SHARED, num_tokens, TOP_K, SHARED, SHARED_ROWS)
        weight = tl.full([SHARED_ROWS], 1.0, tl.float32)
        if HAS_GATE:
            gate = tl.load(shared_gate_T1 + rows[1] * shared_stride, mask=rows[4], other=0.0)
            weight = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))
        down_rows(
            *(hidden_RF, sums_GR, num_rows, shared_down_MN + (expert + SHARED) * inner_size, parts_RM),
            *(hidden_size, inner_size, inner_size * SHARED, expert, column, 0, rows, weight),
            *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
        )
    else:
        if FORMAT == "numbers" and not TMA:
            down_EMF += expert.to(tl.int64) * down_stride
        num_pairs = num_tokens * TOP_K
        if ROWS_FROM == "scan":
            count = count_of(expert, ids_P, num_pairs, TILE)
            for start in range(0, count, ROWS):
                found = rows_at(
                    *(start, count, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                )
                down_rows(
                    *(hidden_RF, sums_GR, num_rows, down_EMF, parts_RM, hidden_size, inner_size, inner_size),
                    *(expert, column, 0, found),
                    tl.load(weights_P + found[0], mask=found[4], other=0.0),
                    *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
                )
        elif HALVES and end - first <= ROWS // 2:
            half = rows_at(
                *(first, end, expert, ids_P, order_P, num_pairs),
                *(ROWS_FROM, TOP_K, SHARED, ROWS // 2, TILE),
            )
            down_rows(
                *(half_RF, sums_GR, num_rows, down_EMF, parts_RM, hidden_size, inner_size, inner_size),
                *(expert, column, first, half),
                tl.load(weights_P + half[0], mask=half[4], other=0.0),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
            )
        else:
            whole = rows_at(
                *(first, end, expert, ids_P, order_P, num_pairs),
                *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
            )
            down_rows(
                *(hidden_RF, sums_GR, num_rows, down_EMF, parts_RM, hidden_size, inner_size, inner_size),
                *(expert, column, first, whole),
                tl.load(weights_P + whole[0], mask=whole[4], other=0.0),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
            )


def grouped_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    shared: SharedParts | None = None,
    *,
    is_scanned: bool | None = None,
    in_parts: bool = False,
) -> Tensor:
    """Returns [T, M]: the weighted sum of the chosen experts' gated MLPs, in the order of choices,
    plus the shared expert (SHARED_TOKENS at most, and few pairs); or what is to be added,
    [T, K + S, M], where rows of experts that are not here hold anything. `is_scanned`: whether
    pairs are looked through; None: if they are few."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_weights.dtype is torch.float32
    assert topk_ids.dtype is torch.int32
    num_tokens, hidden_size = x_TM.shape
    if not num_tokens:
        return torch.empty_like(x_TM)
    is_scanned = is_few(topk_ids) if is_scanned is None else is_scanned
    assert not is_scanned or is_few(topk_ids), topk_ids.shape
    assert shared is None or (is_scanned and num_tokens <= SHARED_TOKENS), topk_ids.shape
    dispatch = Dispatch(
        topk_ids=topk_ids,
        pairs=None if is_scanned else sort_pairs(topk_ids, experts.count, shape.block_p),
        num_experts=experts.count,
        num_shared=count_of_shared(shared),
        rows=shape.block_p,
    )
    hidden = gate_up(x_TM, dispatch, experts, activation, shape.gate_up, shared)
    parts = down(hidden, topk_weights, dispatch, experts, shape.down, shared)
    if in_parts:
        return parts.view(num_tokens, -1, hidden_size)
    return combine(parts, topk_ids, experts.count, dispatch.num_shared)


def gate_up(
    x_TM: Tensor,
    dispatch: Dispatch,
    experts: StackedExperts,
    activation: Activation,
    shape: TileShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns hidden [R, F], undefined where a pair's expert is not here."""
    hidden = x_TM.new_empty((dispatch.num_rows, experts.inner_size))
    is_tma = shape.tma and dispatch.pairs is not None
    gate, up, *of_shared = gate_up_arguments(experts, shared)
    gate_up_kernel[dispatch.grid(experts.inner_size, shape)](
        x_TM,
        group_sums(x_TM, experts.gate_layout),
        _tiles(experts.gate_EFM, shape) if is_tma else gate,
        _tiles(experts.up_EFM, shape) if is_tma else up,
        *of_shared,
        hidden,
        *dispatch.arguments(),
        experts.hidden_size,
        experts.inner_size,
        experts.gate_EFM.stride(0),
        experts.up_EFM.stride(0),
        **dispatch.constants(),
        **shape.constants(experts.hidden_size, is_tma=is_tma, layout=experts.gate_layout),
        HAS_BIAS=experts.biases is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=experts.compute_type(x_TM),
        FORMAT=experts.gate_format,
        **launch_options(x_TM.device),
    )
    return hidden


def down(
    hidden_RF: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    experts: StackedExperts,
    shape: TileShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers, or [T (K + S), M]."""
    parts = hidden_RF.new_empty((dispatch.num_rows, experts.hidden_size))
    is_tma = shape.tma and dispatch.pairs is not None
    stack, shared_down, gate_T1 = down_arguments(experts, shared, topk_weights)
    rows = half = hidden_RF
    if is_tma:
        rows, half = (
            TensorDescriptor.from_tensor(hidden_RF, [height, shape.block_k])
            for height in (dispatch.rows, dispatch.rows // 2)
        )
    down_kernel[dispatch.grid(experts.hidden_size, shape)](
        rows,
        half,
        group_sums(hidden_RF, experts.down_layout),
        _tiles(experts.down_EMF, shape) if is_tma else stack,
        shared_down,
        gate_T1,
        parts,
        topk_weights,
        *dispatch.arguments(),
        experts.hidden_size,
        experts.inner_size,
        experts.down_EMF.stride(0),
        gate_T1.stride(0),
        **dispatch.constants(),
        HAS_GATE=has_gate(shared),
        **shape.constants(experts.inner_size, is_tma=is_tma, layout=experts.down_layout),
        COMPUTE=experts.compute_type(hidden_RF),
        FORMAT=experts.down_format,
        **launch_options(hidden_RF.device),
    )
    return parts


def _tiles(stack: Tensor, shape: TileShape) -> TensorDescriptor:
    block = [1, shape.block_n, shape.block_k]
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), block)
