"""As `pairs.py`, where the experts' weights are packed.

Called by `choose.py` for one token, or two. Sums are made in registers, as in `product/packed.py`.

Shape legend: T tokens, P pairs (token, choice), E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.shapes import PackedPairsShape
from octavo.kernels.triton.experts.stacks import StackedExperts, down_arguments, gate_up_arguments
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.product.packed_shapes import SumsShape
from octavo.kernels.triton.tiles.activation import activation_constant, gated
from octavo.kernels.triton.tiles.codes import parts_of
from octavo.kernels.triton.tiles.packed import scaled_rows
from octavo.kernels.triton.tiles.packed_sums import CHUNK, sums_of_words, sums_packed, words_of


@launchable
@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_of_packed_pair_kernel(
    x_TM,
    gate,
    up,
    gate_bias_EF,
    up_bias_EF,
    hidden_PF,
    ids_P,
    hidden_size,
    inner_size,
    top_k,
    num_experts,
    num_pairs,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[p] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for the pair p = (t, choice), expert e.

    x_TM [T, M]; gate and up planes of [E * F, M]; biases float32 [E, F], HAS_BIAS; hidden_PF
    [P, F]; ids outside [0, E) leave their row of hidden as it was.
    """
    wait_turn(OVERLAP)
    announce(OVERLAP)
    pair = tl.program_id(1)
    expert = tl.load(ids_P + pair, mask=pair < num_pairs, other=-1)
    if (expert < 0) | (expert >= num_experts):
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < inner_size
    row = expert.to(tl.int64) * inner_size + tl.where(is_column, column, 0)
    x_row = x_TM + tl.zeros([1, 1], tl.int64) + (pair // top_k).to(tl.int64) * hidden_size
    every = tl.full([1, 1], True, tl.int1)
    of_gate = tl.zeros([BLOCK_N, WORDS // CHUNK], tl.float32)
    of_up = tl.zeros([BLOCK_N, WORDS // CHUNK], tl.float32)
    for start in range(0, hidden_size, WORDS * parts_of(FORMAT)):
        of_gate = sums_packed(
            of_gate, gate, row[:, None], x_row, every, start, hidden_size, WORDS, FORMAT
        )
        of_up = sums_packed(
            of_up, up, row[:, None], x_row, every, start, hidden_size, WORDS, FORMAT
        )
    gate_sum = scaled_rows(tl.sum(of_gate, 1), gate, row, FORMAT)
    up_sum = scaled_rows(tl.sum(of_up, 1), up, row, FORMAT)
    if HAS_BIAS:
        bias_at = expert.to(tl.int64) * inner_size + column
        gate_sum += tl.load(gate_bias_EF + bias_at, mask=is_column, other=0.0)
        up_sum += tl.load(up_bias_EF + bias_at, mask=is_column, other=0.0)
    value = gated(gate_sum, up_sum, ACTIVATION)
    out = hidden_PF + pair.to(tl.int64) * inner_size + column
    tl.store(out, value.to(hidden_PF.dtype.element_ty), mask=is_column)


@launchable
@triton.jit
def down_and_combine_packed_kernel(
    hidden_PF,
    down,
    out_TM,
    weights_P,
    ids_P,
    hidden_size,
    inner_size,
    num_experts,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum over its pairs p of weights[p] * hidden[p] @ down[e].T, e the pair's expert.

    hidden_PF [P, F]; down planes of [E * M, F]; out_TM [T, M]; CHOICES: a power of two that holds
    TOP_K. All choices advance together; ids outside [0, E) add nothing.
    """
    token = tl.program_id(1)
    choice = tl.arange(0, CHOICES)
    pair = token * TOP_K + choice
    expert = tl.load(ids_P + pair, mask=choice < TOP_K, other=-1)
    is_here = (expert >= 0) & (expert < num_experts)
    weight = tl.load(weights_P + pair, mask=is_here, other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden_size
    first = tl.where(is_here, expert, 0).to(tl.int64) * hidden_size
    row = first[None, :] + tl.where(is_column, column, 0)[:, None]
    rows = hidden_PF + tl.where(is_here, pair, 0).to(tl.int64) * inner_size
    total = tl.zeros([BLOCK_N, CHOICES, WORDS // CHUNK], tl.float32)
    STEP: tl.constexpr = WORDS * parts_of(FORMAT)
    there = is_here[None, :, None]
    # As in `packed_matvec_kernel`; which experts were chosen was known before the last kernel.
    IS_EARLY: tl.constexpr = parts_of(FORMAT) == 2
    if IS_EARLY:
        words, high = words_of(down, row[:, :, None], there, 0, inner_size, WORDS, FORMAT)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    for start in range(0, inner_size, STEP):
        if IS_EARLY:
            following = words_of(
                down, row[:, :, None], there, start + STEP, inner_size, WORDS, FORMAT
            )
            total = sums_of_words(
                *(total, words, high, down, row[:, :, None], rows[None, :, None], there),
                *(start, inner_size, WORDS, FORMAT),
            )
            words, high = following
        else:
            total = sums_packed(
                *(total, down, row[:, :, None], rows[None, :, None], there),
                *(start, inner_size, WORDS, FORMAT),
            )
    of_choice = scaled_rows(tl.sum(total, 2), down, row, FORMAT)
    out = tl.sum(of_choice * weight[None, :], 1)
    at = out_TM + token.to(tl.int64) * hidden_size + column
    tl.store(at, out.to(out_TM.dtype.element_ty), mask=is_column)


def packed_experts_of_pairs(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: PackedPairsShape,
) -> Tensor:
    """Returns what `grouped_experts` does, a pair at a time: for tokens that seldom share experts.
    All matrices are packed."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    hidden = _gate_up(x_TM, topk_ids, experts, activation, shape.gate_up)
    return _down(hidden, topk_weights, topk_ids, experts, shape.down)


def _gate_up(
    x_TM: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: SumsShape,
) -> Tensor:
    num_pairs = topk_ids.numel()
    hidden = x_TM.new_empty((num_pairs, experts.inner_size))
    gate, up, _, _, *biases = gate_up_arguments(experts, None)
    gate_up_of_packed_pair_kernel[(cdiv(experts.inner_size, shape.block_n), num_pairs)](
        x_TM,
        gate,
        up,
        *biases,
        hidden,
        topk_ids,
        experts.hidden_size,
        experts.inner_size,
        topk_ids.shape[1],
        experts.count,
        num_pairs,
        BLOCK_N=shape.block_n,
        WORDS=shape.words,
        HAS_BIAS=experts.biases is not None,
        ACTIVATION=activation_constant(activation),
        FORMAT=experts.gate_format,
        num_warps=shape.num_warps,
        **launch_options(topk_ids.device),
    )
    return hidden


def _down(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    shape: SumsShape,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    out = hidden_PF.new_empty((num_tokens, experts.hidden_size))
    down_and_combine_packed_kernel[(cdiv(experts.hidden_size, shape.block_n), num_tokens)](
        hidden_PF,
        down_arguments(experts, None, topk_weights)[0],
        out,
        topk_weights,
        topk_ids,
        experts.hidden_size,
        experts.inner_size,
        experts.count,
        TOP_K=top_k,
        CHOICES=next_power_of_2(top_k),
        BLOCK_N=shape.block_n,
        WORDS=shape.words,
        FORMAT=experts.down_format,
        num_warps=shape.num_warps,
        **launch_options(topk_ids.device),
    )
    return out
