"""The experts of a MoE layer: grouped products with gate, up and activation in one, then combine.

Called by `backend.py` for pairs sorted by expert (`route.py`); `moe_few.py` multiplies the same
tiles without. Never waits for the device, never adds floats atomically.

Shape legend: T tokens, P pairs (token, slot), E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.moe_plan import Launch, MoePlan
from octavo.kernels.triton.experts.sort import SortedPairs, sort_pairs
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.tiles.activation import activation_constant, gated

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def tile_of_program(num_rows, num_columns, GROUP: tl.constexpr):
    """The (row block, column block) of this program: GROUP row blocks share each column block."""
    program = tl.program_id(0)
    per_group = GROUP * num_columns
    first = program // per_group * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def places_of(row_block, blocks_3B, num_blocks):
    """The expert, the first place and the end place of a row block: see `gate_up_kernel`."""
    at = blocks_3B + row_block
    return tl.load(at), tl.load(at + num_blocks), tl.load(at + 2 * num_blocks)


@triton.jit
def pairs_at(order_P, first, end, ROWS: tl.constexpr):
    """The places first .. first + ROWS, which of them are below end, and the pairs there."""
    place = first + tl.arange(0, ROWS)
    is_row = place < end
    return place, is_row, tl.load(order_P + place, mask=is_row, other=0)


@triton.jit
def gate_up_rows(
    x_TM,
    gate_FM,
    up_FM,
    gate_bias_EF,
    up_bias_EF,
    hidden_PF,
    hidden_size,
    inner_size,
    expert,
    first_column,
    token,
    place,
    is_row,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """hidden[place] = act(x[token] @ gate.T, x[token] @ up.T) in BLOCK_N columns of one expert, its
    biases added to both products (HAS_BIAS), for the rows that are some; TMA: gate and up are
    descriptors of all experts."""
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    safe_token = tl.where(is_row, token, 0).to(tl.int64)
    x_at = x_TM + safe_token[:, None] * hidden_size + k[None, :]
    if not TMA:
        safe = tl.where(column < inner_size, column, 0).to(tl.int64)
        w_at = safe[None, :] * hidden_size + k[:, None]
        gate_at = gate_FM + w_at
        up_at = up_FM + w_at
    gate = tl.zeros([token.shape[0], BLOCK_N], tl.float32)
    up = tl.zeros([token.shape[0], BLOCK_N], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        left = hidden_size - start
        is_in = is_row[:, None] if EVEN_K else is_row[:, None] & (k < left)[None, :]
        x = tl.load(x_at + start, mask=is_in, other=0.0)
        if TMA:
            g = gate_FM.load([expert, first_column, start]).reshape(BLOCK_N, BLOCK_K).T
            u = up_FM.load([expert, first_column, start]).reshape(BLOCK_N, BLOCK_K).T
        elif EVEN_K:
            g = tl.load(gate_at + start)
            u = tl.load(up_at + start)
        else:
            g = tl.load(gate_at + start, mask=(k < left)[:, None], other=0.0)
            u = tl.load(up_at + start, mask=(k < left)[:, None], other=0.0)
        x = x.to(COMPUTE)
        gate = tl.dot(x, g.to(COMPUTE), gate, input_precision="ieee")
        up = tl.dot(x, u.to(COMPUTE), up, input_precision="ieee")
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * inner_size + column
        gate += tl.load(gate_bias_EF + bias_at, mask=column < inner_size, other=0.0)[None, :]
        up += tl.load(up_bias_EF + bias_at, mask=column < inner_size, other=0.0)[None, :]
    value = gated(gate, up, ACTIVATION)
    out = hidden_PF + place.to(tl.int64)[:, None] * inner_size + column[None, :]
    is_out = is_row[:, None] & (column < inner_size)[None, :]
    tl.store(out, value.to(hidden_PF.dtype.element_ty), mask=is_out)


@launchable
@triton.jit(do_not_specialize=["num_blocks"])
def gate_up_kernel(
    x_TM,
    gate_EFM,
    up_EFM,
    gate_bias_EF,
    up_bias_EF,
    hidden_PF,
    order_P,
    blocks_3B,
    hidden_size,
    inner_size,
    gate_stride,
    up_stride,
    top_k,
    num_experts,
    num_blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[i] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for the pair (t, slot) at place i.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; biases float32 [E, F], HAS_BIAS;
    hidden_PF [P, F] in the order of order_P. TMA: gate and up are tensor descriptors of blocks
    [1, BLOCK_N, BLOCK_K]. EVEN_K: BLOCK_K divides the length of the sum. HALVES: blocks that are at
    most half full run at half height.
    """
    wait_turn(OVERLAP)
    row_block, column_block = tile_of_program(num_blocks, tl.cdiv(inner_size, BLOCK_N), GROUP)
    expert, first, end = places_of(row_block, blocks_3B, num_blocks)
    if (expert < 0) | (expert >= num_experts):
        return
    column = column_block * BLOCK_N
    if not TMA:
        gate_EFM += expert.to(tl.int64) * gate_stride
        up_EFM += expert.to(tl.int64) * up_stride
    if HALVES and end - first <= BLOCK_P // 2:
        half_place, is_half, half_pair = pairs_at(order_P, first, end, BLOCK_P // 2)
        gate_up_rows(
            *(x_TM, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_PF),
            *(hidden_size, inner_size, expert, column, half_pair // top_k, half_place, is_half),
            *(BLOCK_N, BLOCK_K, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE),
        )
    else:
        place, is_row, pair = pairs_at(order_P, first, end, BLOCK_P)
        gate_up_rows(
            *(x_TM, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_PF),
            *(hidden_size, inner_size, expert, column, pair // top_k, place, is_row),
            *(BLOCK_N, BLOCK_K, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE),
        )


@triton.jit
def down_rows(
    hidden_PF,
    down_MF,
    parts_PM,
    hidden_size,
    inner_size,
    down_stride,
    expert,
    first_column,
    first,
    place,
    part,
    weight,
    is_row,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """parts[part] = weight * hidden[place] @ down.T in BLOCK_N columns of one expert, whose rows
    are down_stride apart, for the rows that are some; TMA: hidden and down are descriptors, and
    places follow each other from first on."""
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        safe = tl.where(column < hidden_size, column, 0).to(tl.int64)
        safe_place = tl.where(is_row, place, 0).to(tl.int64)
        hidden_at = hidden_PF + safe_place[:, None] * inner_size + k[None, :]
        down_at = down_MF + safe[None, :] * down_stride + k[:, None]
    total = tl.zeros([place.shape[0], BLOCK_N], tl.float32)
    for start in range(0, inner_size, BLOCK_K):
        left = inner_size - start
        if TMA:
            h = hidden_PF.load([first, start])
            w = down_MF.load([expert, first_column, start]).reshape(BLOCK_N, BLOCK_K).T
        elif EVEN_K:
            h = tl.load(hidden_at + start, mask=is_row[:, None], other=0.0)
            w = tl.load(down_at + start)
        else:
            is_in = is_row[:, None] & (k < left)[None, :]
            h = tl.load(hidden_at + start, mask=is_in, other=0.0)
            w = tl.load(down_at + start, mask=(k < left)[:, None], other=0.0)
        total = tl.dot(h.to(COMPUTE), w.to(COMPUTE), total, input_precision="ieee")
    total *= weight[:, None]
    out = parts_PM + part.to(tl.int64)[:, None] * hidden_size + column[None, :]
    is_out = is_row[:, None] & (column < hidden_size)[None, :]
    tl.store(out, total.to(parts_PM.dtype.element_ty), mask=is_out)


@launchable
@triton.jit(do_not_specialize=["num_blocks"])
def down_kernel(
    hidden_PF,
    half_PF,
    down_EMF,
    parts_PM,
    weights_P,
    order_P,
    blocks_3B,
    hidden_size,
    inner_size,
    down_stride,
    num_experts,
    num_blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts[p] = weights[p] * hidden[i] @ down[e].T for the pair p at place i, expert e.

    hidden_PF [P, F] in the order of order_P; down [E, M, F]; parts_PM [P, M] in the order of pairs.
    The rest as in `gate_up_kernel`; with TMA hidden is a descriptor of [BLOCK_P, BLOCK_K] and half
    one of [BLOCK_P / 2, BLOCK_K], else they are the same.
    """
    wait_turn(OVERLAP)
    row_block, column_block = tile_of_program(num_blocks, tl.cdiv(hidden_size, BLOCK_N), GROUP)
    expert, first, end = places_of(row_block, blocks_3B, num_blocks)
    if (expert < 0) | (expert >= num_experts):
        return
    column = column_block * BLOCK_N
    if not TMA:
        down_EMF += expert.to(tl.int64) * down_stride
    if HALVES and end - first <= BLOCK_P // 2:
        half_place, is_half, half_pair = pairs_at(order_P, first, end, BLOCK_P // 2)
        half_weight = tl.load(weights_P + half_pair, mask=is_half, other=0.0)
        down_rows(
            *(half_PF, down_EMF, parts_PM, hidden_size, inner_size, inner_size, expert, column),
            *(first, half_place, half_pair, half_weight, is_half),
            *(BLOCK_N, BLOCK_K, TMA, EVEN_K, COMPUTE),
        )
    else:
        place, is_row, pair = pairs_at(order_P, first, end, BLOCK_P)
        weight = tl.load(weights_P + pair, mask=is_row, other=0.0)
        down_rows(
            *(hidden_PF, down_EMF, parts_PM, hidden_size, inner_size, inner_size, expert, column),
            *(first, place, pair, weight, is_row, BLOCK_N, BLOCK_K, TMA, EVEN_K, COMPUTE),
        )


@launchable
@triton.jit
def combine_kernel(
    parts_PM,
    ids_P,
    out_TM,
    hidden_size,
    num_experts,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum of parts[t * (TOP_K + SHARED) + slot] in the order of slots.

    Those of ids outside [0, E) add 0; the SHARED last ones have no ids."""
    wait_turn(OVERLAP)
    announce(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = column < hidden_size
    total = tl.zeros([BLOCK_N], tl.float32)
    for slot in tl.static_range(TOP_K + SHARED):
        is_here = is_in
        if slot < TOP_K:
            expert = tl.load(ids_P + token * TOP_K + slot)
            is_here = is_in & (expert >= 0) & (expert < num_experts)
        at = parts_PM + (token * (TOP_K + SHARED) + slot) * hidden_size + column
        total += tl.load(at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out_TM + token * hidden_size + column, total.to(out_TM.dtype.element_ty), mask=is_in)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedExperts:
    """The experts of a layer as strided [E, rows, cols] views of whole stacks."""

    gate_EFM: Tensor
    up_EFM: Tensor
    down_EMF: Tensor
    gate_bias_EF: Tensor | None = None
    up_bias_EF: Tensor | None = None
    """float32, both or none. Down's biases are added to the sum (`add_biases`)."""

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """The first products' biases, or what stands in for them where HAS_BIAS is false."""
        if self.gate_bias_EF is None or self.up_bias_EF is None:
            return self.gate_EFM, self.up_EFM
        return self.gate_bias_EF, self.up_bias_EF


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedParts:
    """A shared expert as `count` experts more: gate and up [count * F, M], down [M, count * F]."""

    gate_NM: Tensor
    up_NM: Tensor
    down_MN: Tensor
    gate_T1: Tensor | None
    """Logits of the gate that scales it."""
    count: int


def run_moe(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns [T, M]: the weighted sum of the chosen experts' gated MLPs, in the order of slots; or
    what is to be added, [T, K, M], where rows of experts that are not here hold anything."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_weights.dtype is torch.float32
    assert topk_ids.dtype is torch.int32
    if not len(x_TM):
        return torch.empty_like(x_TM)
    num_experts = len(experts.gate_EFM)
    pairs = sort_pairs(topk_ids, num_experts, plan.block_p)
    hidden = gate_up(x_TM, topk_ids, pairs, experts, activation, plan)
    parts = down(hidden, topk_weights, topk_ids, pairs, experts, plan)
    if in_parts:
        return parts.view(*topk_ids.shape, -1)
    return combine(parts, topk_ids, num_experts)


def gate_up(
    x_TM: Tensor,
    topk_ids: Tensor,
    pairs: SortedPairs,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
) -> Tensor:
    """Returns hidden [P, F] in the order of `pairs`."""
    num_experts, inner_size, hidden_size = experts.gate_EFM.shape
    hidden = x_TM.new_empty((topk_ids.numel(), inner_size))
    launch = plan.gate_up
    num_blocks = pairs.blocks_3B.shape[1]
    gate_up_kernel[(num_blocks * cdiv(inner_size, launch.block_n),)](
        x_TM,
        _stack(experts.gate_EFM, launch),
        _stack(experts.up_EFM, launch),
        *experts.biases,
        hidden,
        pairs.order_P,
        pairs.blocks_3B,
        hidden_size,
        inner_size,
        experts.gate_EFM.stride(0),
        experts.up_EFM.stride(0),
        topk_ids.shape[1],
        num_experts,
        num_blocks,
        BLOCK_P=plan.block_p,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP=launch.group,
        HALVES=plan.block_p >= 128,
        TMA=launch.tma,
        EVEN_K=hidden_size % launch.block_k == 0,
        HAS_BIAS=experts.gate_bias_EF is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=compute_of(x_TM, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return hidden


def down(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    pairs: SortedPairs,
    experts: StackedExperts,
    plan: MoePlan,
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers."""
    num_experts, hidden_size, inner_size = experts.down_EMF.shape
    parts = hidden_PF.new_empty((topk_ids.numel(), hidden_size))
    launch = plan.down
    num_blocks = pairs.blocks_3B.shape[1]
    rows = half = hidden_PF
    if launch.tma:
        rows = TensorDescriptor.from_tensor(hidden_PF, [plan.block_p, launch.block_k])
        half = TensorDescriptor.from_tensor(hidden_PF, [plan.block_p // 2, launch.block_k])
    down_kernel[(num_blocks * cdiv(hidden_size, launch.block_n),)](
        rows,
        half,
        _stack(experts.down_EMF, launch),
        parts,
        topk_weights,
        pairs.order_P,
        pairs.blocks_3B,
        hidden_size,
        inner_size,
        experts.down_EMF.stride(0),
        num_experts,
        num_blocks,
        BLOCK_P=plan.block_p,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP=launch.group,
        HALVES=plan.block_p >= 128,
        TMA=launch.tma,
        EVEN_K=inner_size % launch.block_k == 0,
        COMPUTE=compute_of(hidden_PF, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return parts


def combine(parts_PM: Tensor, topk_ids: Tensor, num_experts: int, shared: int = 0) -> Tensor:
    """Returns [T, M], every token's parts summed in the order of its slots, after which it has
    `shared` parts of a shared expert."""
    num_tokens, top_k = topk_ids.shape
    hidden_size = parts_PM.shape[1]
    out = parts_PM.new_empty((num_tokens, hidden_size))
    columns = min(1024, next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, cdiv(hidden_size, columns))](
        parts_PM,
        topk_ids,
        out,
        hidden_size,
        num_experts,
        TOP_K=top_k,
        SHARED=shared,
        BLOCK_N=columns,
        **launch_options(topk_ids.device),
    )
    return out


def add_biases(out_TM: Tensor, topk_weights: Tensor, topk_ids: Tensor, down_EM: Tensor) -> Tensor:
    """Adds to out, in place, each token's weighted sum of the biases of its experts' last products;
    ids outside [0, E) add nothing."""
    num_experts = len(down_EM)
    is_known = (topk_ids >= 0) & (topk_ids < num_experts)
    weights = topk_weights.masked_fill(~is_known, 0.0)
    spread = weights.new_zeros((len(weights), num_experts))
    spread.scatter_add_(1, topk_ids.masked_fill(~is_known, 0).long(), weights)
    return out_TM.add_((spread @ down_EM).to(out_TM.dtype))


def compute_of(x: Tensor, experts: StackedExperts) -> tl.dtype:
    """What the factors of a product become: themselves if alike, else float32."""
    is_same = x.dtype == experts.gate_EFM.dtype == experts.down_EMF.dtype
    return TL_DTYPES[x.dtype] if is_same else tl.float32


def _stack(stack: Tensor, launch: Launch) -> Tensor | TensorDescriptor:
    if not launch.tma:
        return stack
    block = [1, launch.block_n, launch.block_k]
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), block)
