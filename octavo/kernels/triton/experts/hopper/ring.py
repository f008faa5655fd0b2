"""Experts with packed weights for some tokens, on Hopper: both products of a layer.

Called by `choose.py` where `fits` says so and no row is to be invariant. Pairs are sorted first, or
each has programs of its own (LONE). How codes are read stands in `tiles/hopper/ring.py`.

Shape legend: T tokens, P pairs (token, choice), E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.shapes import RingExpertsShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import has_wgmma
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.numbers import TL_DTYPES
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.launching.tickets import room_for_splits
from octavo.kernels.triton.tiles.activation import activation_constant, gated
from octavo.kernels.triton.tiles.hopper.ring import (
    COLUMNS,
    columns_of_split,
    is_aligned,
    ring_sums,
    takes,
    x_rows_layout,
)
from octavo.kernels.triton.tiles.hopper.splits import is_last_of, stores_layout, sum_of_splits


@gluon.jit
def _expert_of(blocks_3B, block, num_blocks, num_experts):
    """Returns the expert of a block, -1 where there is none; of a lone pair blocks are its ids."""
    expert = gl.load(blocks_3B + block)
    return gl.where((expert >= 0) & (expert < num_experts), expert, -1)


@gluon.jit
def _pairs_of(
    blocks_3B, block, num_blocks, order_P, TOKENS: gl.constexpr, LONE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Returns the rows of hidden of a block's pairs [TOKENS], the pairs, and which are some."""
    number = gl.arange(0, TOKENS, layout)
    if LONE:
        row = block + 0 * number
        pair = row
        is_row = number == 0
    else:
        row = gl.load(blocks_3B + num_blocks + block) + number
        is_row = row < gl.load(blocks_3B + 2 * num_blocks + block)
        pair = gl.load(order_P + row, mask=is_row, other=0)
    return row, pair, is_row


@gluon.jit
def _with_bias(sums, bias_EN, first):
    """Returns sums [rows, tokens] with biases that begin at `first`."""
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, sums.type.layout))
    return sums + gl.load(bias_EN + (first + row)).to(gl.float32)[:, None]


@launchable
@gluon.jit(do_not_specialize=["num_blocks"])
def ring_gate_up_kernel(
    x_TM,
    gate,
    up,
    gate_bias_EF,
    up_bias_EF,
    hidden_PF,
    order_P,
    blocks_3B,
    num_blocks,
    num_experts,
    hidden_size,
    inner_size,
    TOP_K: gl.constexpr,
    LONE: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    COMPUTE: gl.constexpr,
    FORMAT: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """hidden = act(x[t] @ gate[e].T, x[t] @ up[e].T) of the pairs of a block.

    x_TM [T, M]; gate and up planes of [E * F, M]; biases [E, F] any float, HAS_BIAS; hidden_PF
    [P, F] in the order of `sort_pairs`, whose blocks have TOKENS pairs at most; or LONE: in the
    order of pairs, blocks are their ids.
    """
    WARPS: gl.constexpr = gl.num_warps()
    HALF: gl.constexpr = ROWS // 2
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()  # The next kernel brings codes before its turn.
    block = gl.program_id(0) % num_blocks
    column = gl.program_id(0) // num_blocks * HALF
    expert = _expert_of(blocks_3B, block, num_blocks, num_experts)
    if expert >= 0:
        _, pair, is_row = _pairs_of(
            blocks_3B, block, num_blocks, order_P, TOKENS, LONE, x_rows_layout(WARPS)
        )
        total = ring_sums(
            *(x_TM, pair // TOP_K, is_row, (gate, up), expert * inner_size + column, hidden_size),
            *(0, (hidden_size + COLUMNS - 1) // COLUMNS, ROWS, TOKENS, STAGES, TILES, WIDE, EVEN_K),
            *(True, LONE, COMPUTE, FORMAT, False),
        )
        of_gate, of_up = gl.split(total.reshape([ROWS // 16, 2, 8, TOKENS]).permute((0, 2, 3, 1)))
        of_gate, of_up = of_gate.reshape([HALF, TOKENS]), of_up.reshape([HALF, TOKENS])
        if HAS_BIAS:
            first = expert.to(gl.int64) * inner_size + column
            of_gate = _with_bias(of_gate, gate_bias_EF, first)
            of_up = _with_bias(of_up, up_bias_EF, first)
        made = gated(of_gate, of_up, ACTIVATION)
        out: gl.constexpr = stores_layout(HALF, WARPS)
        made = gl.convert_layout(made.to(hidden_PF.dtype.element_ty), out)
        row, _, is_row = _pairs_of(
            blocks_3B, block, num_blocks, order_P, TOKENS, LONE, gl.SliceLayout(0, out)
        )
        at = hidden_PF + row.to(gl.int64)[None, :] * inner_size + column
        at = at + gl.arange(0, HALF, gl.SliceLayout(1, out))[:, None]
        gl.store(at, made, mask=is_row[None, :])


@gluon.jit
def _sum_of_choices(
    sums_SPM, bias_EM, weights_P, ids_P, token, row, num_pairs, num_experts, hidden_size,
    TOP_K: gl.constexpr, SPLITS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Returns the weighted sum of a token's experts, in the order of its choices, for some rows of
    the weight; as `ring_down_kernel` is told them."""
    layout: gl.constexpr = row.type.layout
    total = gl.zeros(row.shape, gl.float32, layout)
    for choice in gl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = gl.load(ids_P + pair)
        is_in = (row >= 0) & (expert >= 0) & (expert < num_experts)
        part = gl.zeros_like(total)
        for split in gl.static_range(SPLITS):
            at = sums_SPM + (split * num_pairs + pair).to(gl.int64) * hidden_size + row
            part += gl.load(at, mask=is_in, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            at = bias_EM + expert.to(gl.int64) * hidden_size + row
            part += gl.load(at, mask=is_in, other=0.0).to(gl.float32)
        total += part * gl.load(weights_P + pair)
    return total


@launchable
@gluon.jit(do_not_specialize=["num_blocks", "num_pairs"])
def ring_down_kernel(
    hidden_PF,
    down,
    bias_EM,
    parts_PM,
    weights_P,
    order_P,
    blocks_3B,
    num_blocks,
    sums_SPM,
    tickets,
    num_pairs,
    num_experts,
    hidden_size,
    inner_size,
    TOP_K: gl.constexpr,
    SPLITS: gl.constexpr,
    LONE: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    COMPUTE: gl.constexpr,
    FORMAT: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """parts[p] = weights[p] * (hidden @ down[e].T (+ bias[e])) for the pairs p of a block.

    parts_PM [P, M] in the order of pairs, LONE: [T, M], the sum of a token's; down planes of
    [E * M, F]; bias_EM any float. SPLITS > 1: program 1 sums its part of F alone, to sums float32
    [SPLITS, P, M], and the last of a tile adds them in rising order; so it is with all programs of
    a token if they are LONE. The rest as in `ring_gate_up_kernel`.
    """
    WARPS: gl.constexpr = gl.num_warps()
    block = gl.program_id(0) % num_blocks
    column = gl.program_id(0) // num_blocks * ROWS
    # Which pairs there are was written before the kernel whose end is waited for.
    expert = _expert_of(blocks_3B, block, num_blocks, num_experts)
    if expert >= 0:
        row, _, is_row = _pairs_of(
            blocks_3B, block, num_blocks, order_P, TOKENS, LONE, x_rows_layout(WARPS)
        )
        begin, end = columns_of_split(inner_size, SPLITS, FORMAT)
        total = ring_sums(
            *(hidden_PF, row, is_row, (down, down), expert * hidden_size + column, inner_size),
            *(begin, end, ROWS, TOKENS, STAGES, TILES, WIDE, EVEN_K),
            *(False, LONE, COMPUTE, FORMAT, OVERLAP),
        )
        out: gl.constexpr = stores_layout(ROWS, WARPS)
        total = gl.convert_layout(total, out)
        _, pair, is_row = _pairs_of(
            blocks_3B, block, num_blocks, order_P, TOKENS, LONE, gl.SliceLayout(0, out)
        )
        at = pair.to(gl.int64)[None, :] * hidden_size + column
        at = at + gl.arange(0, ROWS, gl.SliceLayout(1, out))[:, None]
        step, ticket = num_pairs.to(gl.int64) * hidden_size, tickets + gl.program_id(0)
        if LONE:
            gl.store(sums_SPM + (at + gl.program_id(1) * step), total, mask=is_row[None, :])
        else:
            total, is_last = sum_of_splits(
                total, sums_SPM, at, step, is_row[None, :], ticket, SPLITS
            )
            if is_last:
                if HAS_BIAS:
                    total = _with_bias(total, bias_EM, expert.to(gl.int64) * hidden_size + column)
                weight = gl.load(weights_P + pair, mask=is_row, other=0.0)
                value = (total * weight[None, :]).to(parts_PM.dtype.element_ty)
                gl.store(parts_PM + at, value, mask=is_row[None, :])
    elif OVERLAP:
        gdc_wait()
    if LONE:
        token = block // TOP_K
        ticket = tickets + (token * (hidden_size // ROWS) + gl.program_id(0) // num_blocks)
        if is_last_of(ticket, TOP_K * SPLITS):
            row = column + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
            total = _sum_of_choices(
                *(sums_SPM, bias_EM, weights_P, blocks_3B, token, row, num_pairs, num_experts),
                *(hidden_size, TOP_K, SPLITS, HAS_BIAS),
            )
            to = parts_PM + token.to(gl.int64) * hidden_size + row
            gl.store(to, total.to(parts_PM.dtype.element_ty))


def fits(x_TM: Tensor, experts: StackedExperts) -> bool:
    """Whether the kernels here can run experts on x of a dtype and device; never depends on how
    many rows x has."""
    gate, down = experts.gate_layout, experts.down_layout
    if gate is None or down is None or x_TM.element_size() != 2 or not has_wgmma(x_TM.device):
        return False
    assert experts.gate_up_planes is not None
    assert experts.down_planes is not None
    hidden_size, inner_size = experts.hidden_size, experts.inner_size
    is_whole = inner_size % 64 == hidden_size % 64 == 0
    is_known = is_whole and takes(gate, hidden_size) and takes(down, inner_size)
    return is_known and all(map(is_aligned, (*experts.gate_up_planes, experts.down_planes)))


def ring_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: RingExpertsShape,
    tickets: Tensor | None = None,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does, with all biases. `tickets`: see `make_tickets`; for
    shapes that split a sum, and lone ones, which have no parts."""
    assert not (in_parts and shape.is_lone)
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_weights.dtype is torch.float32
    assert experts.gate_up_planes is not None
    if not len(x_TM):
        return torch.empty_like(x_TM)
    if shape.is_lone:
        dispatch = topk_ids, topk_ids, topk_ids.numel()
    else:
        pairs = sort_pairs(topk_ids, experts.count, shape.gate_up.tokens)
        dispatch = pairs.order_P, pairs.blocks_3B, pairs.blocks_3B.shape[1]
    gate, up = experts.gate_up_planes
    biases = experts.biases
    hidden = x_TM.new_empty((topk_ids.numel(), experts.inner_size))
    ring_gate_up_kernel[(dispatch[2] * (2 * experts.inner_size // shape.gate_up.rows),)](
        x_TM,
        gate.arguments(),
        up.arguments(),
        *((x_TM, x_TM) if biases is None else (biases.gate_EF, biases.up_EF)),
        hidden,
        *dispatch,
        experts.count,
        experts.hidden_size,
        experts.inner_size,
        TOP_K=topk_ids.shape[1],
        LONE=shape.is_lone,
        **shape.gate_up.constants(experts.hidden_size),
        HAS_BIAS=biases is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=TL_DTYPES[x_TM.dtype],
        FORMAT=experts.gate_format,
        **launch_options(x_TM.device),
    )
    parts = _down(hidden, topk_weights, dispatch, experts, shape, tickets)
    if in_parts:
        return parts.view(len(x_TM), -1, experts.hidden_size)
    return parts if shape.is_lone else combine(parts, topk_ids, experts.count)


def _down(
    hidden_PF: Tensor,
    topk_weights: Tensor,
    dispatch: tuple[Tensor, Tensor, int],
    experts: StackedExperts,
    shape: RingExpertsShape,
    tickets: Tensor | None,
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers, of lone ones the sums
    of each token's [T, M]."""
    assert experts.down_planes is not None
    num_pairs, hidden_size = len(hidden_PF), experts.hidden_size
    grid, splits = dispatch[2] * (hidden_size // shape.down.rows), shape.down.splits
    top_k = topk_weights.shape[1]
    parts = hidden_PF.new_empty((num_pairs // top_k if shape.is_lone else num_pairs, hidden_size))
    of_splits = room_for_splits(
        *(parts, splits, (num_pairs, hidden_size), grid, tickets), is_always=shape.is_lone
    )
    ring_down_kernel[(grid, splits)](
        hidden_PF,
        experts.down_planes.arguments(),
        parts if experts.biases is None else experts.biases.down_EM,
        parts,
        topk_weights,
        *dispatch,
        *of_splits,
        num_pairs,
        experts.count,
        hidden_size,
        experts.inner_size,
        TOP_K=top_k,
        SPLITS=splits,
        LONE=shape.is_lone,
        **shape.down.constants(experts.inner_size),
        HAS_BIAS=experts.biases is not None,
        COMPUTE=TL_DTYPES[parts.dtype],
        FORMAT=experts.down_format,
        **launch_options(parts.device),
    )
    return parts
