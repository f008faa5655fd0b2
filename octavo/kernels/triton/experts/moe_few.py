"""The experts of few tokens: every program finds the pairs of its expert itself, nothing is sorted.

Called by `backend.py`. A launch less than sorting takes, and a shared expert whose hidden size is a
multiple of the others' runs beside them as that many more: two products and what joins them less.
Tiles are those of `moe.py`, and so are the bits. Never waits for the device.

Shape legend: T tokens, P pairs (token, slot), E experts, S parts of the shared expert, M hidden,
F expert hidden. Row t (K + S) + slot of hidden and parts belongs to slot of token t; the parts of
the shared expert follow its K pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.moe import (
    SharedParts,
    StackedExperts,
    combine,
    compute_of,
    down_rows,
    gate_up_rows,
)
from octavo.kernels.triton.experts.moe_plan import MoePlan
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.activation import activation_constant

FEW_TOKENS = 64
FEW_PAIRS = 1024
"""Beyond, each program would look at too many."""
SHARED_TOKENS = 32
"""A shared expert's rows are all tokens: with more they would be too many for one tile."""
PAIRS_TILE = 256


@triton.jit
def count_of(expert, ids_P, num_pairs, TILE: tl.constexpr):
    """Returns how many pairs chose `expert`."""
    hits = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, num_pairs, TILE, num_stages=1):
        pair = start + tl.arange(0, TILE)
        hits += (tl.load(ids_P + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
    return tl.sum(hits, 0)


@triton.jit
def pairs_of(expert, first, ids_P, num_pairs, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Returns ROWS pairs of those that chose `expert`, in rising order, from number `first` on; 0
    where there are no more."""
    number = first + tl.arange(0, ROWS)
    found = tl.zeros([ROWS], tl.int32)
    before = expert * 0
    for start in tl.range(0, num_pairs, TILE, num_stages=1):
        pair = start + tl.arange(0, TILE)
        is_mine = tl.load(ids_P + pair, mask=pair < num_pairs, other=-1) == expert
        rank = before + tl.cumsum(is_mine.to(tl.int32), 0)  # from 1 on, where it is mine
        is_it = is_mine[None, :] & (rank[None, :] == number[:, None] + 1)
        found += tl.sum(tl.where(is_it, pair[None, :], 0), 1)
        before += tl.sum(is_mine.to(tl.int32), 0)
    return found


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def few_gate_up_kernel(
    x_TM,
    gate_EFM,
    up_EFM,
    shared_gate_NM,
    shared_up_NM,
    gate_bias_EF,
    up_bias_EF,
    hidden_RF,
    ids_P,
    hidden_size,
    inner_size,
    gate_stride,
    up_stride,
    num_tokens,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[row] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for every pair of expert e, which is
    program 0 past the SHARED parts of a shared expert, whose rows are all tokens.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; biases float32 [E, F], HAS_BIAS; ROWS
    pairs at a time.
    """
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(inner_size, BLOCK_N)
    expert = tl.program_id(0) // num_columns - SHARED
    column = tl.program_id(0) % num_columns * BLOCK_N
    WIDTH: tl.constexpr = TOP_K + SHARED
    if SHARED > 0 and expert < 0:
        token = tl.arange(0, SHARED_ROWS)
        part = expert + SHARED
        skipped = part.to(tl.int64) * inner_size * hidden_size
        gate_up_rows(
            *(x_TM, shared_gate_NM + skipped, shared_up_NM + skipped),
            *(gate_bias_EF, up_bias_EF, hidden_RF, hidden_size, inner_size, expert, column),
            *(token, token * WIDTH + TOP_K + part, token < num_tokens),
            *(BLOCK_N, BLOCK_K, False, EVEN_K, False, ACTIVATION, COMPUTE),
        )
    else:
        num_pairs = num_tokens * TOP_K
        count = count_of(expert, ids_P, num_pairs, TILE)
        gate_EFM += expert.to(tl.int64) * gate_stride
        up_EFM += expert.to(tl.int64) * up_stride
        for first in range(0, count, ROWS):
            pair = pairs_of(expert, first, ids_P, num_pairs, ROWS, TILE)
            token = pair // TOP_K
            gate_up_rows(
                *(x_TM, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF, hidden_RF),
                *(hidden_size, inner_size, expert, column),
                *(token, token * SHARED + pair, first + tl.arange(0, ROWS) < count),
                *(BLOCK_N, BLOCK_K, False, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE),
            )


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def few_down_kernel(
    hidden_RF,
    down_EMF,
    shared_down_MN,
    shared_gate_T1,
    parts_RM,
    weights_P,
    ids_P,
    hidden_size,
    inner_size,
    down_stride,
    gate_stride,
    num_tokens,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts[row] = weight * hidden[row] @ down[e].T for every pair of expert e, as above; weight is
    the pair's, or sigmoid(shared_gate[t]) or 1 for the parts of the shared expert."""
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(hidden_size, BLOCK_N)
    expert = tl.program_id(0) // num_columns - SHARED
    column = tl.program_id(0) % num_columns * BLOCK_N
    WIDTH: tl.constexpr = TOP_K + SHARED
    if SHARED > 0 and expert < 0:
        token = tl.arange(0, SHARED_ROWS)
        is_row = token < num_tokens
        part = expert + SHARED
        row = token * WIDTH + TOP_K + part
        weight = tl.full([SHARED_ROWS], 1.0, tl.float32)
        if HAS_GATE:
            gate = tl.load(shared_gate_T1 + token * gate_stride, mask=is_row, other=0.0)
            weight = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))
        down_rows(
            *(hidden_RF, shared_down_MN + part * inner_size, parts_RM, hidden_size, inner_size),
            *(inner_size * SHARED, expert, column, 0, row, row, weight, is_row),
            *(BLOCK_N, BLOCK_K, False, EVEN_K, COMPUTE),
        )
    else:
        num_pairs = num_tokens * TOP_K
        count = count_of(expert, ids_P, num_pairs, TILE)
        down_EMF += expert.to(tl.int64) * down_stride
        for first in range(0, count, ROWS):
            pair = pairs_of(expert, first, ids_P, num_pairs, ROWS, TILE)
            is_row = first + tl.arange(0, ROWS) < count
            weight = tl.load(weights_P + pair, mask=is_row, other=0.0)
            row = pair // TOP_K * SHARED + pair
            down_rows(
                *(hidden_RF, down_EMF, parts_RM, hidden_size, inner_size, inner_size),
                *(expert, column, 0, row, row, weight, is_row),
                *(BLOCK_N, BLOCK_K, False, EVEN_K, COMPUTE),
            )


def is_few(topk_ids: Tensor) -> bool:
    """Whether `moe_of_few` takes so many tokens."""
    return len(topk_ids) <= FEW_TOKENS and topk_ids.numel() <= FEW_PAIRS


def moe_of_few(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
    shared: SharedParts | None = None,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `moe.run_moe` does, bit by bit; plus the shared expert (SHARED_TOKENS)."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert is_few(topk_ids), topk_ids.shape
    num_tokens, hidden_size = x_TM.shape
    if not num_tokens:
        return torch.empty_like(x_TM)
    assert shared is None or len(x_TM) <= SHARED_TOKENS, len(x_TM)
    hidden = gate_up_of_few(x_TM, topk_ids, experts, activation, plan, shared)
    parts = down_of_few(hidden, topk_weights, topk_ids, experts, plan, shared)
    if in_parts:
        return parts.view(num_tokens, -1, hidden_size)
    return combine(parts, topk_ids, len(experts.gate_EFM), 0 if shared is None else shared.count)


def gate_up_of_few(
    x_TM: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    plan: MoePlan,
    shared: SharedParts | None,
) -> Tensor:
    """Returns hidden [T * (K + S), F], undefined where a pair's expert is not here."""
    num_experts, inner_size, hidden_size = experts.gate_EFM.shape
    num_tokens, top_k = topk_ids.shape
    count = 0 if shared is None else shared.count
    hidden = x_TM.new_empty((num_tokens * (top_k + count), inner_size))
    launch = plan.gate_up
    few_gate_up_kernel[((num_experts + count) * cdiv(inner_size, launch.block_n),)](
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
        num_tokens,
        TOP_K=top_k,
        SHARED=count,
        SHARED_ROWS=_shared_rows(num_tokens, count),
        ROWS=plan.block_p,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        TILE=PAIRS_TILE,
        EVEN_K=hidden_size % launch.block_k == 0,
        HAS_BIAS=experts.gate_bias_EF is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=compute_of(x_TM, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return hidden


def down_of_few(
    hidden_RF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    plan: MoePlan,
    shared: SharedParts | None,
) -> Tensor:
    """Returns the weighted parts [T * (K + S), M]."""
    num_experts, hidden_size, inner_size = experts.down_EMF.shape
    num_tokens, top_k = topk_ids.shape
    count = 0 if shared is None else shared.count
    gate_T1 = None if shared is None else shared.gate_T1
    parts = hidden_RF.new_empty((len(hidden_RF), hidden_size))
    launch = plan.down
    few_down_kernel[((num_experts + count) * cdiv(hidden_size, launch.block_n),)](
        hidden_RF,
        experts.down_EMF,
        experts.down_EMF if shared is None else shared.down_MN,
        topk_weights if gate_T1 is None else gate_T1,
        parts,
        topk_weights,
        topk_ids,
        hidden_size,
        inner_size,
        experts.down_EMF.stride(0),
        0 if gate_T1 is None else gate_T1.stride(0),
        num_tokens,
        TOP_K=top_k,
        SHARED=count,
        SHARED_ROWS=_shared_rows(num_tokens, count),
        HAS_GATE=gate_T1 is not None,
        ROWS=plan.block_p,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        TILE=PAIRS_TILE,
        EVEN_K=inner_size % launch.block_k == 0,
        COMPUTE=compute_of(hidden_RF, experts),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(topk_ids.device),
    )
    return parts


def _shared_rows(num_tokens: int, count: int) -> int:
    """Returns what holds all tokens; without parts of a shared expert one value, since nobody reads
    it and every value is a binary."""
    return SHARED_TOKENS if count and num_tokens > 16 else 16
