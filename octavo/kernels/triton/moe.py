"""The experts of a MoE layer: grouped products with gate, up and activation in one, then combine.

Called by `ops.py`. Few tokens: a program per pair and column block, nothing sorted. Else: pairs
sorted by expert (`route.py`). Never waits for the device, never adds floats atomically.

Shape legend: T tokens, P pairs (token, slot), E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.ops import Activation
from octavo.kernels.triton.activation import activated
from octavo.kernels.triton.launch import cdiv, launchable, next_power_of_2
from octavo.kernels.triton.moe_plan import Launch, MoePlan
from octavo.kernels.triton.overlap import launch_options, wait_turn
from octavo.kernels.triton.route import SortedPairs, sort_pairs

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
def places_of(row_block, order_P, blocks_3B, num_blocks, DIRECT: tl.constexpr):
    """The expert, the first place and the end place of a row block: see `gate_up_kernel`."""
    if DIRECT:
        return tl.load(order_P + row_block), row_block, row_block + 1
    at = blocks_3B + row_block
    return tl.load(at), tl.load(at + num_blocks), tl.load(at + 2 * num_blocks)


@triton.jit
def gate_up_rows(
    x_TM,
    gate_FM,
    up_FM,
    hidden_PF,
    order_P,
    hidden_size,
    inner_size,
    top_k,
    expert,
    first_column,
    first,
    end,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIRECT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`gate_up_kernel` at the places [first, end), at most ROWS, of one expert, BLOCK_N columns."""
    place = first + tl.arange(0, ROWS)
    is_row = place < end
    pair = place
    if not DIRECT:
        pair = tl.load(order_P + place, mask=is_row, other=0)
    token = tl.where(is_row, pair // top_k, 0).to(tl.int64)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_TM + token[:, None] * hidden_size + k[None, :]
    if not TMA:
        safe = tl.where(column < inner_size, column, 0).to(tl.int64)
        w_at = safe[None, :] * hidden_size + k[:, None]
        gate_at = gate_FM + w_at
        up_at = up_FM + w_at
    gate = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
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
    value = activated(gate, ACTIVATION) * up
    out = hidden_PF + place.to(tl.int64)[:, None] * inner_size + column[None, :]
    is_out = is_row[:, None] & (column < inner_size)[None, :]
    tl.store(out, value.to(hidden_PF.dtype.element_ty), mask=is_out)


@launchable
@triton.jit(do_not_specialize=["num_blocks"])
def gate_up_kernel(
    x_TM,
    gate_EFM,
    up_EFM,
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
    DIRECT: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[i] = act(x[t] @ gate[e].T) * (x[t] @ up[e].T) for the pair (t, slot) at place i.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; hidden_PF [P, F] in the order of
    order_P. DIRECT: the place is the pair, order_P holds the pairs' experts, no blocks.
    TMA: gate and up are tensor descriptors of blocks [1, BLOCK_N, BLOCK_K]. EVEN_K: BLOCK_K
    divides the length of the sum. HALVES: blocks that are at most half full run at half height.
    """
    wait_turn(OVERLAP)
    row_block, column_block = tile_of_program(num_blocks, tl.cdiv(inner_size, BLOCK_N), GROUP)
    expert, first, end = places_of(row_block, order_P, blocks_3B, num_blocks, DIRECT)
    if (expert < 0) | (expert >= num_experts):
        return
    column = column_block * BLOCK_N
    if not TMA:
        gate_EFM += expert.to(tl.int64) * gate_stride
        up_EFM += expert.to(tl.int64) * up_stride
    if HALVES and end - first <= BLOCK_P // 2:
        gate_up_rows(
            *(x_TM, gate_EFM, up_EFM, hidden_PF, order_P, hidden_size, inner_size, top_k),
            *(expert, column, first, end),
            *(BLOCK_P // 2, BLOCK_N, BLOCK_K, DIRECT, TMA, EVEN_K, ACTIVATION, COMPUTE),
        )
    else:
        gate_up_rows(
            *(x_TM, gate_EFM, up_EFM, hidden_PF, order_P, hidden_size, inner_size, top_k),
            *(expert, column, first, end),
            *(BLOCK_P, BLOCK_N, BLOCK_K, DIRECT, TMA, EVEN_K, ACTIVATION, COMPUTE),
        )


@triton.jit
def down_rows(
    hidden_PF,
    down_MF,
    parts_PM,
    weights_P,
    order_P,
    hidden_size,
    inner_size,
    expert,
    first_column,
    first,
    end,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIRECT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The places [first, end), at most ROWS, of one expert and BLOCK_N columns: `down_kernel`."""
    place = first + tl.arange(0, ROWS)
    is_row = place < end
    pair = place
    if not DIRECT:
        pair = tl.load(order_P + place, mask=is_row, other=0)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        safe = tl.where(column < hidden_size, column, 0).to(tl.int64)
        hidden_at = hidden_PF + place.to(tl.int64)[:, None] * inner_size + k[None, :]
        down_at = down_MF + safe[None, :] * inner_size + k[:, None]
    part = tl.zeros([ROWS, BLOCK_N], tl.float32)
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
        part = tl.dot(h.to(COMPUTE), w.to(COMPUTE), part, input_precision="ieee")
    part *= tl.load(weights_P + pair, mask=is_row, other=0.0)[:, None]
    out = parts_PM + pair.to(tl.int64)[:, None] * hidden_size + column[None, :]
    is_out = is_row[:, None] & (column < hidden_size)[None, :]
    tl.store(out, part.to(parts_PM.dtype.element_ty), mask=is_out)


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
    DIRECT: tl.constexpr,
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
    expert, first, end = places_of(row_block, order_P, blocks_3B, num_blocks, DIRECT)
    if (expert < 0) | (expert >= num_experts):
        return
    column = column_block * BLOCK_N
    if not TMA:
        down_EMF += expert.to(tl.int64) * down_stride
    if HALVES and end - first <= BLOCK_P // 2:
        down_rows(
            *(half_PF, down_EMF, parts_PM, weights_P, order_P, hidden_size, inner_size),
            *(expert, column, first, end),
            *(BLOCK_P // 2, BLOCK_N, BLOCK_K, DIRECT, TMA, EVEN_K, COMPUTE),
        )
    else:
        down_rows(
            *(hidden_PF, down_EMF, parts_PM, weights_P, order_P, hidden_size, inner_size),
            *(expert, column, first, end),
            *(BLOCK_P, BLOCK_N, BLOCK_K, DIRECT, TMA, EVEN_K, COMPUTE),
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
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum of parts[t * TOP_K + slot] in the order of slots; ids outside [0, E) add 0."""
    wait_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = column < hidden_size
    total = tl.zeros([BLOCK_N], tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids_P + pair)
        is_here = is_in & (expert >= 0) & (expert < num_experts)
        at = parts_PM + pair * hidden_size + column
        total += tl.load(at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out_TM + token * hidden_size + column, total.to(out_TM.dtype.element_ty), mask=is_in)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedExperts:
    """The experts of a layer as strided [E, rows, cols] views of whole stacks."""

    gate_EFM: Tensor
    up_EFM: Tensor
    down_EMF: Tensor


def run_moe(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
) -> Tensor:
    """Returns [T, M]: the weighted sum of the chosen experts' gated MLPs, in the order of slots."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_weights.dtype is torch.float32
    assert topk_ids.dtype is torch.int32
    if not len(x_TM):
        return torch.empty_like(x_TM)
    num_experts = len(experts.gate_EFM)
    pairs = None if plan.is_direct else sort_pairs(topk_ids, num_experts, plan.block_p)
    hidden = gate_up(x_TM, topk_ids, pairs, experts, activation, plan)
    parts = down(hidden, topk_weights, topk_ids, pairs, experts, plan)
    return combine(parts, topk_ids, num_experts)


def gate_up(
    x_TM: Tensor,
    topk_ids: Tensor,
    pairs: SortedPairs | None,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
) -> Tensor:
    """Returns hidden [P, F] in the order of `pairs`, or of the pairs' numbers without them."""
    num_experts, inner_size, hidden_size = experts.gate_EFM.shape
    hidden = x_TM.new_empty((topk_ids.numel(), inner_size))
    launch = plan.gate_up
    num_blocks = topk_ids.numel() if pairs is None else pairs.blocks_3B.shape[1]
    gate_up_kernel[(num_blocks * cdiv(inner_size, launch.block_n),)](
        x_TM,
        _stack(experts.gate_EFM, launch),
        _stack(experts.up_EFM, launch),
        hidden,
        topk_ids if pairs is None else pairs.order_P,
        topk_ids if pairs is None else pairs.blocks_3B,
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
        DIRECT=pairs is None,
        HALVES=plan.block_p >= 128,
        TMA=launch.tma,
        EVEN_K=hidden_size % launch.block_k == 0,
        ACTIVATION=activation,
        COMPUTE=_compute(x_TM, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return hidden


def down(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    pairs: SortedPairs | None,
    experts: StackedExperts,
    plan: MoePlan,
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers."""
    num_experts, hidden_size, inner_size = experts.down_EMF.shape
    parts = hidden_PF.new_empty((topk_ids.numel(), hidden_size))
    launch = plan.down
    num_blocks = topk_ids.numel() if pairs is None else pairs.blocks_3B.shape[1]
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
        topk_ids if pairs is None else pairs.order_P,
        topk_ids if pairs is None else pairs.blocks_3B,
        hidden_size,
        inner_size,
        experts.down_EMF.stride(0),
        num_experts,
        num_blocks,
        BLOCK_P=plan.block_p,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP=launch.group,
        DIRECT=pairs is None,
        HALVES=plan.block_p >= 128,
        TMA=launch.tma,
        EVEN_K=inner_size % launch.block_k == 0,
        COMPUTE=_compute(hidden_PF, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return parts


def combine(parts_PM: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Returns [T, M], every token's parts summed in the order of its slots."""
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
        BLOCK_N=columns,
        **launch_options(topk_ids.device),
    )
    return out


def _compute(x: Tensor, experts: StackedExperts) -> tl.dtype:
    """What the factors of a product become: themselves if alike, else float32."""
    is_same = x.dtype == experts.gate_EFM.dtype == experts.down_EMF.dtype
    return TL_DTYPES[x.dtype] if is_same else tl.float32


def _stack(stack: Tensor, launch: Launch) -> Tensor | TensorDescriptor:
    if not launch.tma:
        return stack
    block = [1, launch.block_n, launch.block_k]
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), block)
