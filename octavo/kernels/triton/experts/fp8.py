"""The experts of a MoE layer where FP8 weights with a scale a row meet FP8 activations.

Called by `choose.py` for many tokens, where `hopper/fp8.py` does not fit. As `grouped.py` where
pairs are sorted; tokens are quantised once, and what is between the two products again.

Shape legend: T tokens, P pairs (token, choice), E experts, M hidden, F expert hidden, R rows of
hidden in the pairs' order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.activations import Activation
from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.shapes import Fp8ExpertsShape
from octavo.kernels.triton.experts.sort import SortedPairs, sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.product.packed_shapes import Fp8Shape
from octavo.kernels.triton.small.quantize import quantize_rows
from octavo.kernels.triton.tiles.activation import activation_constant, gated
from octavo.kernels.triton.tiles.grid import tile_of_program


@triton.jit
def block_of_program(blocks_3B, num_blocks, num_columns, GROUP: tl.constexpr):
    """Returns the expert, the first pair, the end of the pairs and the column block."""
    block, column = tile_of_program(num_blocks, num_columns, GROUP)
    at = blocks_3B + block
    return tl.load(at), tl.load(at + num_blocks), tl.load(at + 2 * num_blocks), column


@launchable
@triton.jit(do_not_specialize=["num_blocks"])
def fp8_gate_up_kernel(
    x_TM,
    x_scales_T,
    gate_NM,
    up_NM,
    gate_scales_N,
    up_scales_N,
    gate_bias_EF,
    up_bias_EF,
    hidden_RF,
    order_P,
    blocks_3B,
    num_blocks,
    num_experts,
    padded,
    inner_size,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[r] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for the pair in place r, token t, expert e.

    x_TM e4m3 [T, padded]; gate and up are descriptors of e4m3 [E * F, padded] in blocks [BLOCK_N,
    BLOCK_K]; biases float32 [E, F], HAS_BIAS.
    """
    wait_turn(OVERLAP)
    expert, first, end, column_block = block_of_program(
        blocks_3B, num_blocks, tl.cdiv(inner_size, BLOCK_N), GROUP
    )
    if (expert < 0) | (expert >= num_experts):
        return
    row = first + tl.arange(0, BLOCK_T)
    is_row = row < end
    token = tl.load(order_P + row, mask=is_row, other=0) // TOP_K
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < inner_size
    start_row = expert * inner_size + column_block * BLOCK_N
    weight_row = expert.to(tl.int64) * inner_size + tl.where(is_column, column, 0)
    k = tl.arange(0, BLOCK_K)
    x_at = x_TM + token.to(tl.int64)[:, None] * padded + k[None, :]
    gate = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, padded, BLOCK_K):
        x = tl.load(x_at + start)
        gate = tl.dot(x, gate_NM.load([start_row, start]).T, gate)
        up = tl.dot(x, up_NM.load([start_row, start]).T, up)
    x_scale = tl.load(x_scales_T + token)
    gate *= x_scale[:, None] * tl.load(gate_scales_N + weight_row)[None, :]
    up *= x_scale[:, None] * tl.load(up_scales_N + weight_row)[None, :]
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * inner_size + column
        gate += tl.load(gate_bias_EF + bias_at, mask=is_column, other=0.0)[None, :]
        up += tl.load(up_bias_EF + bias_at, mask=is_column, other=0.0)[None, :]
    value = gated(gate, up, ACTIVATION)
    out = hidden_RF + row.to(tl.int64)[:, None] * inner_size + column[None, :]
    tl.store(out, value.to(hidden_RF.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@launchable
@triton.jit(do_not_specialize=["num_blocks"])
def fp8_down_kernel(
    hidden_RF,
    hidden_scales_R,
    down_NF,
    scales_N,
    parts_PM,
    weights_P,
    order_P,
    blocks_3B,
    num_blocks,
    num_experts,
    padded,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts[p] = weights[p] * hidden[r] @ down[e].T for the pair p in place r, of an expert e.

    hidden_RF and down_NF are descriptors of e4m3 [R, padded] and [E * M, padded] in blocks [BLOCK_T
    or BLOCK_N, BLOCK_K]; parts_PM [P, M] in the order of the pairs' numbers.
    """
    wait_turn(OVERLAP)
    expert, first, end, column_block = block_of_program(
        blocks_3B, num_blocks, tl.cdiv(hidden_size, BLOCK_N), GROUP
    )
    if (expert < 0) | (expert >= num_experts):
        return
    row = first + tl.arange(0, BLOCK_T)
    is_row = row < end
    pair = tl.load(order_P + row, mask=is_row, other=0)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden_size
    start_row = expert * hidden_size + column_block * BLOCK_N
    weight_row = expert.to(tl.int64) * hidden_size + tl.where(is_column, column, 0)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, padded, BLOCK_K):
        h = hidden_RF.load([first, start])
        total = tl.dot(h, down_NF.load([start_row, start]).T, total)
    h_scale = tl.load(hidden_scales_R + row, mask=is_row, other=0.0)
    total *= h_scale[:, None] * tl.load(scales_N + weight_row)[None, :]
    total *= tl.load(weights_P + pair, mask=is_row, other=0.0)[:, None]
    out = parts_PM + pair.to(tl.int64)[:, None] * hidden_size + column[None, :]
    tl.store(out, total.to(parts_PM.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def fp8_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: Fp8ExpertsShape,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does, activations rounded to FP8; all matrices are FP8 with
    a scale a row."""
    assert experts.gate_up_planes is not None
    assert experts.down_planes is not None
    num_tokens, hidden_size = x_TM.shape
    if not num_tokens:
        return torch.empty_like(x_TM)
    pairs = sort_pairs(topk_ids, experts.count, shape.rows)
    hidden = _gate_up(x_TM, pairs, topk_ids.shape[1], experts, activation, shape.gate_up)
    parts = _down(hidden, topk_weights, pairs, experts, shape.down)
    if in_parts:
        return parts.view(num_tokens, -1, hidden_size)
    return combine(parts, topk_ids, experts.count, 0)


def _gate_up(
    x_TM: Tensor,
    pairs: SortedPairs,
    top_k: int,
    experts: StackedExperts,
    activation: Activation,
    shape: Fp8Shape,
) -> Tensor:
    layout, biases = experts.gate_layout, experts.biases
    assert layout is not None
    assert experts.gate_up_planes is not None
    gate, up = experts.gate_up_planes
    x = quantize_rows(x_TM, layout.padded(experts.hidden_size), by_block=False)
    hidden = x_TM.new_empty((len(x_TM) * top_k, experts.inner_size))
    num_blocks = pairs.blocks_3B.shape[1]
    fp8_gate_up_kernel[(num_blocks * cdiv(experts.inner_size, shape.block_n),)](
        x.numbers,
        x.scales,
        _tiles(gate, shape),
        _tiles(up, shape),
        gate.scales,
        up.scales,
        *((gate.scales, up.scales) if biases is None else (biases.gate_EF, biases.up_EF)),
        hidden,
        pairs.order_P,
        pairs.blocks_3B,
        num_blocks,
        experts.count,
        x.numbers.shape[1],
        experts.inner_size,
        TOP_K=top_k,
        **_constants(shape),
        HAS_BIAS=biases is not None,
        ACTIVATION=activation_constant(activation),
        **launch_options(hidden.device),
    )
    return hidden


def _down(
    hidden_RF: Tensor,
    topk_weights: Tensor,
    pairs: SortedPairs,
    experts: StackedExperts,
    shape: Fp8Shape,
) -> Tensor:
    layout, planes = experts.down_layout, experts.down_planes
    assert layout is not None
    assert planes is not None
    rows = quantize_rows(hidden_RF, layout.padded(experts.inner_size), by_block=False)
    parts = hidden_RF.new_empty((len(hidden_RF), experts.hidden_size))
    num_blocks = pairs.blocks_3B.shape[1]
    fp8_down_kernel[(num_blocks * cdiv(experts.hidden_size, shape.block_n),)](
        TensorDescriptor.from_tensor(rows.numbers, [shape.block_t, shape.block_k]),
        rows.scales,
        _tiles(planes, shape),
        planes.scales,
        parts,
        topk_weights,
        pairs.order_P,
        pairs.blocks_3B,
        num_blocks,
        experts.count,
        rows.numbers.shape[1],
        experts.hidden_size,
        **_constants(shape),
        **launch_options(parts.device),
    )
    return parts


def _constants(shape: Fp8Shape) -> dict[str, int]:
    return {
        "BLOCK_T": shape.block_t,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "GROUP": 8,
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }


def _tiles(planes: Planes, shape: Fp8Shape) -> TensorDescriptor:
    numbers = planes.codes.view(torch.float8_e4m3fn)
    return TensorDescriptor.from_tensor(numbers, [shape.block_n, shape.block_k])
