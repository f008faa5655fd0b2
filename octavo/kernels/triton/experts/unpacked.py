"""Packed experts made numbers: where tokens are so many that this is little beside them, and where
no kernel multiplies with experts as they are.

Called by `choose_packed.py`. One room serves both products of a layer: gate and up come a part of
the experts after the other, and then all of down, which takes as much. Where pairs are fewer than
experts, numbers are made of an expert for each pair.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.facts import UNPACKED_PARTS
from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import Dispatch, is_few
from octavo.kernels.triton.experts.grouped import down, gate_up
from octavo.kernels.triton.experts.hopper import many
from octavo.kernels.triton.experts.shapes import ExpertsShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.product.grids import unpack_blocks
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.weights import ExpertBiases, Weight
from octavo.planes import PlaneLayout


def unpacked_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    *,
    num_pairs: int = 0,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does, of experts whose weights are packed, or some of them.
    `num_pairs`: how many count when kernels are chosen."""
    ids, chosen = _chosen(topk_ids, experts.count)
    count = experts.count if chosen is None else len(chosen)
    dispatch = Dispatch(
        topk_ids=ids,
        pairs=None if is_few(ids) else sort_pairs(ids, count, shape.block_p),
        num_experts=count,
        num_shared=0,
        rows=shape.block_p,
    )
    # Programs that look for their own pairs do so among all experts.
    has_parts = experts.is_packed_gate and dispatch.pairs is not None
    at_once = cdiv(count, UNPACKED_PARTS) if has_parts else count
    room = _room(experts, count, at_once, x_TM)
    hidden = x_TM.new_empty((dispatch.num_rows, experts.inner_size))
    pairs = dispatch.pairs if many.fits(x_TM, experts, num_pairs) else None
    in_order = None if pairs is None else many.rows_in_order(x_TM, pairs)
    for first in range(0, count, at_once):
        end = min(first + at_once, count)
        part = _gates(experts, chosen, first, end, room)
        if pairs is not None and in_order is not None:
            many.many_gate_up(in_order, pairs, part, activation, hidden, first)
        else:
            of_part = _within(dispatch, first, end)
            gate_up(x_TM, of_part, part, activation, shape.gate_up, out_RF=hidden)
    downs = _downs(experts, chosen, room)
    del in_order  # Its memory is that of the parts.
    if pairs is not None:
        parts = many.many_down(hidden, topk_weights, pairs, downs.down_EMF)
    else:
        parts = down(hidden, topk_weights, dispatch, downs, shape.down)
    if in_parts:
        return parts.view(len(x_TM), -1, experts.hidden_size)
    return combine(parts, ids, count)


def _chosen(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor | None]:
    """Returns ids among the experts that become numbers, and which those are: None for all."""
    if topk_ids.numel() >= num_experts:
        return topk_ids, None
    flat = topk_ids.flatten()
    places = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    return torch.where(flat >= 0, places, -1).view(topk_ids.shape), flat.clamp(min=0)


def _room(experts: StackedExperts, count: int, at_once: int, like: Tensor) -> Tensor:
    """Returns room for the numbers that there are at once."""
    matrix = experts.inner_size * experts.hidden_size
    gates = 2 * at_once * matrix if experts.is_packed_gate else 0
    return like.new_empty(max(gates, count * matrix if experts.is_packed_down else 0))


def _within(dispatch: Dispatch, first: int, end: int) -> Dispatch:
    """Returns what goes to some of the experts."""
    pairs = dispatch.pairs
    if pairs is None or end - first == dispatch.num_experts:
        return dispatch
    blocks = pairs.blocks_3B
    if first:
        blocks = torch.cat((blocks[:1] - first, blocks[1:]))
    return replace(dispatch, pairs=replace(pairs, blocks_3B=blocks), num_experts=end - first)


def _gates(
    experts: StackedExperts, chosen: Tensor | None, first: int, end: int, room: Tensor
) -> StackedExperts:
    """Returns some of the experts, with gate and up as numbers."""
    rows, cols = experts.inner_size, experts.hidden_size
    size = (end - first) * rows * cols
    gate, up = experts.gate_up_planes or experts.gate_up_blocks or (None, None)
    some = experts.gate_layout, cols, chosen, first, end
    return replace(
        experts,
        gate_EFM=_numbers(experts.gate_EFM, gate, *some, room[:size]),
        up_EFM=_numbers(experts.up_EFM, up, *some, room[size : 2 * size]),
        gate_up_planes=None,
        gate_up_blocks=None,
        gate_layout=None,
        biases=_biases_of(experts.biases, chosen, first, end),
    )


def _downs(experts: StackedExperts, chosen: Tensor | None, room: Tensor) -> StackedExperts:
    """Returns the experts, or those chosen, with down as numbers."""
    count = experts.count if chosen is None else len(chosen)
    packed, cols = experts.down_planes or experts.down_blocks, experts.inner_size
    to = room[: count * experts.hidden_size * cols]
    made = _numbers(
        *(experts.down_EMF, packed, experts.down_layout, cols, chosen, 0, count, to),
    )
    return replace(experts, down_EMF=made, down_planes=None, down_blocks=None, down_layout=None)


def _numbers(
    stack_ENK: Tensor,
    packed: Planes | Weight | None,
    layout: PlaneLayout | None,
    cols: int,
    chosen: Tensor | None,
    first: int,
    end: int,
    to: Tensor,
) -> Tensor:
    """Returns a stack of experts as numbers, or those chosen, from `first` to `end`; in `to`, where
    they are packed."""
    rows = stack_ENK.shape[1]
    if packed is None:
        return stack_ENK[first:end] if chosen is None else stack_ENK[chosen[first:end]]
    out_NM, ids = to.view(-1, cols), None if chosen is None else chosen[first:end]
    if isinstance(packed, Weight):
        if ids is None:
            part = packed.data[first * rows : end * rows]
            packed = replace(packed, data=part, rows=len(part))
        unpack_blocks(packed, to.dtype, ids, rows, out_NM)
    else:
        assert layout is not None
        if ids is None:
            packed = packed.rows(first * rows, end * rows)
        of_rows = None if ids is None else _rows_of(ids, rows)
        unpack(packed, layout, cols, to.dtype, of_rows, out_NM)
    return to.view(-1, rows, cols)


def _rows_of(ids: Tensor, rows: int) -> Tensor:
    """Returns the rows of matrices that have so many each."""
    each = torch.arange(rows, dtype=torch.int32, device=ids.device)
    return (ids[:, None] * rows + each).flatten()


def _biases_of(
    biases: ExpertBiases | None, chosen: Tensor | None, first: int, end: int
) -> ExpertBiases | None:
    if biases is None:
        return None
    some = slice(first, end) if chosen is None else chosen[first:end]
    return ExpertBiases(
        gate_EF=biases.gate_EF[some], up_EF=biases.up_EF[some], down_EM=biases.down_EM[some]
    )
