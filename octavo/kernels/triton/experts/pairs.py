"""The experts of one token, or two: a program has a pair, and nothing is gathered.

Called by `choose.py` where tokens seldom share experts. Never where batch invariance was promised:
a row's bits differ from those that `grouped.py` gives it in a larger batch. Sums are made in
registers, as in `product/matvec.py`.

Shape legend: T tokens, P pairs (token, choice), E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.shapes import PairsShape
from octavo.kernels.triton.experts.stacks import (
    SharedParts,
    StackedExperts,
    count_of_shared,
    down_arguments,
    gate_up_arguments,
    has_gate,
)
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.product.shapes import RowsShape
from octavo.kernels.triton.tiles.activation import activation_constant, gated
from octavo.kernels.triton.tiles.weight import folded, weight_at, weight_tile


@launchable
@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_of_pair_kernel(
    x_TM,
    gate_EFM,
    up_EFM,
    shared_gate_NM,
    shared_up_NM,
    gate_bias_EF,
    up_bias_EF,
    hidden_PF,
    ids_P,
    hidden_size,
    inner_size,
    gate_stride,
    up_stride,
    top_k,
    num_experts,
    num_pairs,
    HAS_SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[p] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for the pair p = (t, choice), expert e.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; biases float32 [E, F], HAS_BIAS;
    hidden_PF [P, F]; ids outside [0, E) leave their row of hidden as it was. HAS_SHARED (one
    token): pair num_pairs + i is part i of the shared expert, its rows i F .. (i + 1) F.
    """
    wait_turn(OVERLAP)
    announce(OVERLAP)
    pair = tl.program_id(1)
    is_routed = pair < num_pairs
    expert = tl.load(ids_P + pair, mask=is_routed, other=0)
    if (expert < 0) | (expert >= num_experts):
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_column = column < inner_size
    gate_MF = gate_EFM + expert.to(tl.int64) * gate_stride
    up_MF = up_EFM + expert.to(tl.int64) * up_stride
    token = pair // top_k
    if HAS_SHARED:
        part = (pair - num_pairs).to(tl.int64) * inner_size * hidden_size
        gate_MF = tl.where(is_routed, gate_MF, shared_gate_NM + part)
        up_MF = tl.where(is_routed, up_MF, shared_up_NM + part)
        token = 0
    safe = tl.where(is_column, column, 0)[:, None]
    gate_at = weight_at((gate_MF,), safe, hidden_size, k[None, :], FORMAT)
    up_at = weight_at((up_MF,), safe, hidden_size, k[None, :], FORMAT)
    x_at = x_TM + token.to(tl.int64) * hidden_size + k
    gate = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        is_in = k < hidden_size - start
        g = weight_tile(gate_at, start, is_in[None, :], FORMAT, False)
        u = weight_tile(up_at, start, is_in[None, :], FORMAT, False)
        x = tl.load(x_at + start, mask=is_in, other=0.0)[None, :]
        gate += folded(g, x)
        up += folded(u, x)
    gate_sum, up_sum = tl.sum(gate, 1), tl.sum(up, 1)
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * inner_size + column
        gate_sum += tl.load(gate_bias_EF + bias_at, mask=is_column & is_routed, other=0.0)
        up_sum += tl.load(up_bias_EF + bias_at, mask=is_column & is_routed, other=0.0)
    value = gated(gate_sum, up_sum, ACTIVATION)
    out = hidden_PF + pair.to(tl.int64) * inner_size + column
    tl.store(out, value.to(hidden_PF.dtype.element_ty), mask=is_column)


@launchable
@triton.jit
def down_and_combine_kernel(
    hidden_PF,
    down_EMF,
    shared_down_MN,
    shared_gate,
    out_TM,
    weights_P,
    ids_P,
    hidden_size,
    inner_size,
    down_stride,
    num_experts,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum over its pairs p of weights[p] * hidden[p] @ down[e].T, e the pair's expert.

    hidden_PF [P, F]; down [E, M, F] with stride_E given; out_TM [T, M]; CHOICES: a power of two
    that holds TOP_K + PARTS. All choices advance together; ids outside [0, E) add nothing. The
    PARTS of a shared expert (one token; see above) follow the pairs, with weight
    sigmoid(shared_gate) or 1.
    """
    token = tl.program_id(1)
    choice = tl.arange(0, CHOICES)
    pair = token * TOP_K + choice
    expert = tl.load(ids_P + pair, mask=choice < TOP_K, other=-1)
    is_here = (expert >= 0) & (expert < num_experts)
    weight = tl.load(weights_P + pair, mask=is_here, other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_column = column < hidden_size
    down_MF = down_EMF + tl.where(is_here, expert, 0).to(tl.int64) * down_stride
    stride = tl.full([CHOICES], inner_size, tl.int64)
    if PARTS:
        is_shared = (choice >= TOP_K) & (choice < TOP_K + PARTS)
        part_at = shared_down_MN + tl.where(is_shared, choice - TOP_K, 0) * inner_size
        down_MF = tl.where(is_shared, part_at, down_MF)
        stride = tl.where(is_shared, stride * PARTS, stride)
        gate = 1.0
        if HAS_GATE:
            gate = 1.0 / (1.0 + tl.exp(-tl.load(shared_gate).to(tl.float32)))
        weight = tl.where(is_shared, gate, weight)
        is_here = is_here | is_shared
    safe = tl.where(is_column, column, 0)[:, None, None]
    planes = (down_MF[None, :, None],)
    down_at = weight_at(planes, safe, stride[None, :, None], k[None, None, :], FORMAT)
    hidden_at = hidden_PF + pair.to(tl.int64)[:, None] * inner_size + k[None, :]
    total = tl.zeros([BLOCK_N, CHOICES, BLOCK_K // 8], tl.float32)
    is_first = is_here[:, None] & (k < inner_size)[None, :]
    w = weight_tile(down_at, 0, is_first[None, :, :], FORMAT, False)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    for start in range(0, inner_size, BLOCK_K):
        is_in = is_here[:, None] & (k < inner_size - start)[None, :]
        h = tl.load(hidden_at + start, mask=is_in, other=0.0)
        total += folded(w, h[None, :, :])
        is_next = is_here[:, None] & (k < inner_size - start - BLOCK_K)[None, :]
        w = weight_tile(down_at, start, is_next[None, :, :], FORMAT, False, BLOCK_K)
    out = tl.sum(tl.sum(total, 2) * weight[None, :], 1)
    at = out_TM + token.to(tl.int64) * hidden_size + column
    tl.store(at, out.to(out_TM.dtype.element_ty), mask=is_column)


def experts_of_pairs(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: PairsShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns what `grouped_experts` does, a pair at a time: for tokens that seldom share experts.
    Plus the shared expert, for one token."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    hidden = gate_up_of_pairs(x_TM, topk_ids, experts, activation, shape.gate_up, shared)
    return down_and_combine(hidden, topk_weights, topk_ids, experts, shape.down, shared)


def gate_up_of_pairs(
    x_TM: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: RowsShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns hidden [P, F], undefined where a pair's expert is not here; the parts of the shared
    expert follow."""
    assert shared is None or len(x_TM) == 1
    num_rows = topk_ids.numel() + count_of_shared(shared)
    hidden = x_TM.new_empty((num_rows, experts.inner_size))
    gate_up_of_pair_kernel[(cdiv(experts.inner_size, shape.block_n), num_rows)](
        x_TM,
        *gate_up_arguments(experts, shared),
        hidden,
        topk_ids,
        experts.hidden_size,
        experts.inner_size,
        experts.gate_EFM.stride(0),
        experts.up_EFM.stride(0),
        topk_ids.shape[1],
        experts.count,
        topk_ids.numel(),
        HAS_SHARED=shared is not None,
        HAS_BIAS=experts.biases is not None,
        ACTIVATION=activation_constant(activation),
        FORMAT="numbers",
        **shape.constants(),
        **launch_options(topk_ids.device),
    )
    return hidden


def down_and_combine(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    shape: RowsShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns [T, M], the weighted sum over each token's experts; no parts are stored.

    The launch before may still be writing hidden, but what it was given must be there: ids, weights
    and the logit of the shared expert's gate are read before its end (`overlap.py`)."""
    num_tokens, top_k = topk_ids.shape
    num_parts = count_of_shared(shared)
    out = hidden_PF.new_empty((num_tokens, experts.hidden_size))
    down_and_combine_kernel[(cdiv(experts.hidden_size, shape.block_n), num_tokens)](
        hidden_PF,
        *down_arguments(experts, shared, topk_weights),
        out,
        topk_weights,
        topk_ids,
        experts.hidden_size,
        experts.inner_size,
        experts.down_EMF.stride(0),
        experts.count,
        TOP_K=top_k,
        PARTS=num_parts,
        HAS_GATE=has_gate(shared),
        CHOICES=next_power_of_2(top_k + num_parts),
        FORMAT="numbers",
        **shape.constants(),
        **launch_options(topk_ids.device),
    )
    return out
