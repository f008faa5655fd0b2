"""Products with one row: programs sum a few rows of the weight in registers, no tensor cores.

Called by `backend.py` for steps of one token, and for its experts. Never where batch invariance was
promised: a row's bits differ from those that `linear.py` and `moe.py` give it in a larger batch.

Such a step reads weights and does little else. `tl.dot` sends them through shared memory, about one
program a multiprocessor; here several programs a multiprocessor wait for 16-byte loads at once.

Shape legend: T tokens, P pairs (token, slot), E experts, M hidden, F expert hidden, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.moe import SharedParts, StackedExperts
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.tiles.activation import activation_constant, gated


@triton.jit
def folded(w, x):
    """Sums of 8 neighbours of w * x: what one thread holds of a 16-byte load of 16-bit numbers."""
    products = w.to(tl.float32) * x.to(tl.float32)
    return tl.sum(products.reshape(*w.shape[:-1], w.shape[-1] // 8, 8), len(w.shape))


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
    OVERLAP: tl.constexpr,
):
    """out[n] = sum over m of x[m] * weight[n, m] (+ bias[n]), in float32.

    x_M [M] contiguous, weight_NM [N, M] with a row stride, out_N [N], bias_N [N] any float.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = row < num_rows
    weight_at = (
        weight_NM + tl.where(is_row, row, 0).to(tl.int64)[:, None] * weight_stride + k[None, :]
    )
    # Weights are written by no kernel: the first of them travel while the last kernel ends.
    is_in = (k < hidden_size)[None, :]
    w = tl.load(weight_at, mask=is_in, other=0.0)
    wait_turn(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        left = hidden_size - start
        x = tl.load(x_M + start + k, mask=k < left, other=0.0)
        is_next = (k < left - BLOCK_K)[None, :]
        next_at = weight_at + start + BLOCK_K
        following = tl.load(next_at, mask=is_next, other=0.0)
        total += folded(w, x[None, :])
        w = following
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias_N + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_N + row, out.to(out_N.dtype.element_ty), mask=is_row)


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
    OVERLAP: tl.constexpr,
):
    """hidden[p] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for the pair p = (t, slot), expert e.

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
    weight_at = tl.where(is_column, column, 0).to(tl.int64)[:, None] * hidden_size + k[None, :]
    gate_at = gate_EFM + expert.to(tl.int64) * gate_stride
    up_at = up_EFM + expert.to(tl.int64) * up_stride
    token = pair // top_k
    if HAS_SHARED:
        part = (pair - num_pairs).to(tl.int64) * inner_size * hidden_size
        gate_at = tl.where(is_routed, gate_at, shared_gate_NM + part)
        up_at = tl.where(is_routed, up_at, shared_up_NM + part)
        token = 0
    gate_at += weight_at
    up_at += weight_at
    x_at = x_TM + token.to(tl.int64) * hidden_size + k
    gate = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        is_in = k < hidden_size - start
        mask = is_in[None, :]
        g = tl.load(gate_at + start, mask=mask, other=0.0)
        u = tl.load(up_at + start, mask=mask, other=0.0)
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
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum over its pairs p of weights[p] * hidden[p] @ down[e].T, e the pair's expert.

    hidden_PF [P, F]; down [E, M, F] with stride_E given; out_TM [T, M]; SLOTS: a power of two that
    holds TOP_K + PARTS. All slots advance together; ids outside [0, E) add nothing. The PARTS of a
    shared expert (one token; see above) follow the pairs, with weight sigmoid(shared_gate) or 1.
    """
    token = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    pair = token * TOP_K + slot
    expert = tl.load(ids_P + pair, mask=slot < TOP_K, other=-1)
    is_here = (expert >= 0) & (expert < num_experts)
    weight = tl.load(weights_P + pair, mask=is_here, other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_column = column < hidden_size
    down_at = down_EMF + tl.where(is_here, expert, 0).to(tl.int64) * down_stride
    stride = tl.full([SLOTS], inner_size, tl.int64)
    if PARTS:
        is_shared = (slot >= TOP_K) & (slot < TOP_K + PARTS)
        part_at = shared_down_MN + tl.where(is_shared, slot - TOP_K, 0) * inner_size
        down_at = tl.where(is_shared, part_at, down_at)
        stride = tl.where(is_shared, stride * PARTS, stride)
        gate = 1.0
        if HAS_GATE:
            gate = 1.0 / (1.0 + tl.exp(-tl.load(shared_gate).to(tl.float32)))
        weight = tl.where(is_shared, gate, weight)
        is_here = is_here | is_shared
    safe = tl.where(is_column, column, 0)
    down_at = down_at[None, :, None] + safe[:, None, None] * stride[None, :, None]
    down_at += k[None, None, :]
    hidden_at = hidden_PF + pair.to(tl.int64)[:, None] * inner_size + k[None, :]
    total = tl.zeros([BLOCK_N, SLOTS, BLOCK_K // 8], tl.float32)
    is_first = is_here[:, None] & (k < inner_size)[None, :]
    w = tl.load(down_at, mask=is_first[None, :, :], other=0.0)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    for start in range(0, inner_size, BLOCK_K):
        is_in = is_here[:, None] & (k < inner_size - start)[None, :]
        h = tl.load(hidden_at + start, mask=is_in, other=0.0)
        total += folded(w, h[None, :, :])
        is_next = is_here[:, None] & (k < inner_size - start - BLOCK_K)[None, :]
        w = tl.load(down_at + start + BLOCK_K, mask=is_next[None, :, :], other=0.0)
    out = tl.sum(tl.sum(total, 2) * weight[None, :], 1)
    at = out_TM + token.to(tl.int64) * hidden_size + column
    tl.store(at, out.to(out_TM.dtype.element_ty), mask=is_column)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsPlan:
    """The launch shape of one kernel: rows of the weight a program, and a step along them."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsPlan:
    """The launch shapes of `moe_of_pairs`."""

    gate_up: RowsPlan
    down: RowsPlan


def plan_matvec(num_rows: int, hidden_size: int) -> RowsPlan:
    """Returns the launch shape of a dense product, the best on an H100 for Qwen3 and Qwen1.5
    (benchmarks/kernels/decode.py): rows of one step on their own, longer ones by four."""
    is_long = hidden_size > 2048
    return RowsPlan(
        block_n=4 if is_long else 1,
        block_k=_step(hidden_size, 2048),
        num_warps=8 if is_long or num_rows <= 512 else 4,
    )


def plan_pairs(hidden_size: int, inner_size: int, top_k: int) -> PairsPlan:
    """Returns the launch shapes of `gate_up_of_pair_kernel`, which reads two rows for each one, and
    of `down_and_combine_kernel`: all slots of a step together."""
    block_k = _step(inner_size, 256)
    return PairsPlan(
        gate_up=RowsPlan(block_n=1, block_k=_step(hidden_size, 2048), num_warps=4),
        down=RowsPlan(block_n=2 if top_k <= 8 else 1, block_k=block_k, num_warps=4),
    )


def _step(length: int, limit: int) -> int:
    return max(8, min(limit, next_power_of_2(length)))


def matvec(
    x_TM: Tensor, weight_NM: Tensor, bias_N: Tensor | None, out_TN: Tensor, plan: RowsPlan
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, for one row of x."""
    num_rows, hidden_size = weight_NM.shape
    assert x_TM.shape == (1, hidden_size)
    assert out_TN.shape == (1, num_rows)
    assert x_TM.stride(1) == 1 or hidden_size == 1
    assert out_TN.stride(1) == 1 or num_rows == 1
    assert weight_NM.stride(1) == 1 or hidden_size == 1
    matvec_kernel[(cdiv(num_rows, plan.block_n),)](
        x_TM,
        weight_NM,
        x_TM if bias_N is None else bias_N,
        out_TN,
        num_rows,
        hidden_size,
        weight_NM.stride(0),
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        HAS_BIAS=bias_N is not None,
        num_warps=plan.num_warps,
        **launch_options(out_TN.device),
    )


def moe_of_pairs(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: PairsPlan,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns what `moe.run_moe` does, a pair at a time: for tokens that seldom share experts.
    Plus the shared expert, for one token."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    hidden = gate_up_of_pairs(x_TM, topk_ids, experts, activation, plan.gate_up, shared)
    return down_and_combine(hidden, topk_weights, topk_ids, experts, plan.down, shared)


def gate_up_of_pairs(
    x_TM: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: RowsPlan,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns hidden [P, F], undefined where a pair's expert is not here; the parts of the shared
    expert follow."""
    num_experts, inner_size, hidden_size = experts.gate_EFM.shape
    assert shared is None or len(x_TM) == 1
    num_rows = topk_ids.numel() + (0 if shared is None else shared.count)
    hidden = x_TM.new_empty((num_rows, inner_size))
    gate_up_of_pair_kernel[(cdiv(inner_size, plan.block_n), len(hidden))](
        x_TM,
        experts.gate_EFM,
        experts.up_EFM,
        experts.gate_EFM if shared is None else shared.gate_NM,
        experts.up_EFM if shared is None else shared.up_NM,
        *experts.biases,
        hidden,
        topk_ids,
        hidden_size,
        inner_size,
        experts.gate_EFM.stride(0),
        experts.up_EFM.stride(0),
        topk_ids.shape[1],
        num_experts,
        topk_ids.numel(),
        HAS_SHARED=shared is not None,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        HAS_BIAS=experts.gate_bias_EF is not None,
        ACTIVATION=activation_constant(activation),
        num_warps=plan.num_warps,
        **launch_options(topk_ids.device),
    )
    return hidden


def down_and_combine(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    plan: RowsPlan,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns [T, M], the weighted sum over each token's experts; no parts are stored.

    The launch before may still be writing hidden, but what it was given must be there: ids, weights
    and the logit of the shared expert's gate are read before its end (`overlap.py`)."""
    num_experts, hidden_size, inner_size = experts.down_EMF.shape
    num_tokens, top_k = topk_ids.shape
    parts = 0 if shared is None else shared.count
    logit = None if shared is None else shared.gate_T1
    out = hidden_PF.new_empty((num_tokens, hidden_size))
    down_and_combine_kernel[(cdiv(hidden_size, plan.block_n), num_tokens)](
        hidden_PF,
        experts.down_EMF,
        experts.down_EMF if shared is None else shared.down_MN,
        topk_weights if logit is None else logit,
        out,
        topk_weights,
        topk_ids,
        hidden_size,
        inner_size,
        experts.down_EMF.stride(0),
        num_experts,
        TOP_K=top_k,
        PARTS=parts,
        HAS_GATE=logit is not None,
        SLOTS=next_power_of_2(top_k + parts),
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        **launch_options(topk_ids.device),
    )
    return out
