"""Packed experts made numbers, for steps of so many tokens that this is little beside them.

Called by `choose.py`. One room serves both products of a layer: gate and up come a part of the
experts after the other, and then all of down, which takes as much.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.facts import UNPACKED_PARTS
from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import Dispatch
from octavo.kernels.triton.experts.grouped import down, gate_up
from octavo.kernels.triton.experts.shapes import ExpertsShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.product.packed import unpack
from octavo.planes import PlaneLayout


def unpacked_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does, of experts whose weights are packed, or some of them."""
    pairs = sort_pairs(topk_ids, experts.count, shape.block_p)
    dispatch = Dispatch(
        topk_ids=topk_ids,
        pairs=pairs,
        num_experts=experts.count,
        num_shared=0,
        rows=shape.block_p,
    )
    room = _room(experts, x_TM)
    hidden = x_TM.new_empty((dispatch.num_rows, experts.inner_size))
    for first in range(0, experts.count, _gates_at_once(experts)):
        part, of_part = _gates(experts, dispatch, first, room)
        gate_up(x_TM, of_part, part, activation, shape.gate_up, out_RF=hidden)
    parts = down(hidden, topk_weights, dispatch, _downs(experts, room), shape.down)
    if in_parts:
        return parts.view(len(x_TM), -1, experts.hidden_size)
    return combine(parts, topk_ids, experts.count)


def _gates_at_once(experts: StackedExperts) -> int:
    return experts.count if experts.gate_layout is None else cdiv(experts.count, UNPACKED_PARTS)


def _room(experts: StackedExperts, like: Tensor) -> Tensor:
    """Returns room for the numbers that there are at once."""
    matrix = experts.inner_size * experts.hidden_size
    gates = 0 if experts.gate_layout is None else 2 * _gates_at_once(experts) * matrix
    downs = 0 if experts.down_layout is None else experts.count * matrix
    return like.new_empty(max(gates, downs))


def _gates(
    experts: StackedExperts, dispatch: Dispatch, first: int, room: Tensor
) -> tuple[StackedExperts, Dispatch]:
    """Returns as many experts as there is room for, from `first` on, with gate and up as numbers,
    and what goes to them."""
    if experts.gate_layout is None:
        return experts, dispatch
    assert experts.gate_up_planes is not None
    assert dispatch.pairs is not None
    end = min(first + _gates_at_once(experts), experts.count)
    rows, cols = experts.inner_size, experts.hidden_size
    size = (end - first) * rows * cols
    gate, up = (
        _numbers(planes.rows(first * rows, end * rows), experts.gate_layout, cols, to).view(
            end - first, rows, cols
        )
        for planes, to in zip(
            experts.gate_up_planes, (room[:size], room[size : 2 * size]), strict=True
        )
    )
    biases = experts.biases
    if biases is not None:
        biases = replace(biases, gate_EF=biases.gate_EF[first:end], up_EF=biases.up_EF[first:end])
    blocks = dispatch.pairs.blocks_3B
    if first:
        blocks = torch.cat((blocks[:1] - first, blocks[1:]))
    return (
        replace(
            experts,
            gate_EFM=gate,
            up_EFM=up,
            gate_up_planes=None,
            gate_layout=None,
            biases=biases,
        ),
        replace(dispatch, pairs=replace(dispatch.pairs, blocks_3B=blocks), num_experts=end - first),
    )


def _downs(experts: StackedExperts, room: Tensor) -> StackedExperts:
    """Returns the experts with down as numbers."""
    if experts.down_layout is None:
        return experts
    assert experts.down_planes is not None
    rows, cols = experts.hidden_size, experts.inner_size
    to = room[: experts.count * rows * cols]
    made = _numbers(experts.down_planes, experts.down_layout, cols, to)
    return replace(experts, down_EMF=made.view(-1, rows, cols), down_planes=None, down_layout=None)


def _numbers(planes: Planes, layout: PlaneLayout, cols: int, to: Tensor) -> Tensor:
    return unpack(planes, layout, cols, to.dtype, out_NM=to.view(-1, cols))
