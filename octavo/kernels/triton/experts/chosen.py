"""The experts of some pairs made numbers, where no kernel multiplies with them as they are.

Called by `choose_packed.py`. What it returns lives as long as the layer runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import Dispatch, is_few
from octavo.kernels.triton.experts.grouped import down, gate_up
from octavo.kernels.triton.experts.shapes import ExpertsShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.product.grids import unpack_blocks
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.weights import ExpertBiases, Weight
from octavo.planes import PlaneLayout


def run_chosen(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does. Numbers are made of an expert for each pair, where pairs
    are fewer than experts; those of gate and up are gone before there are any of down."""
    dtype, (ids, chosen) = x_TM.dtype, _chosen(topk_ids, experts.count)
    count = experts.count if chosen is None else len(chosen)
    is_scanned = is_few(ids)
    dispatch = Dispatch(
        topk_ids=ids,
        pairs=None if is_scanned else sort_pairs(ids, count, shape.block_p),
        num_experts=count,
        num_shared=0,
        rows=shape.block_p,
    )
    hidden = gate_up(x_TM, dispatch, _gates(experts, dtype, chosen), activation, shape.gate_up)
    parts = down(hidden, topk_weights, dispatch, _downs(experts, dtype, chosen), shape.down)
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


def _gates(experts: StackedExperts, dtype: torch.dtype, chosen: Tensor | None) -> StackedExperts:
    gate, up = experts.gate_up_planes or experts.gate_up_blocks or (None, None)
    layout, hidden = experts.gate_layout, experts.hidden_size
    return replace(
        experts,
        gate_EFM=_numbers(experts.gate_EFM, gate, layout, hidden, dtype, chosen),
        up_EFM=_numbers(experts.up_EFM, up, layout, hidden, dtype, chosen),
        gate_up_planes=None,
        gate_up_blocks=None,
        gate_layout=None,
        biases=_biases_of(experts.biases, chosen),
    )


def _downs(experts: StackedExperts, dtype: torch.dtype, chosen: Tensor | None) -> StackedExperts:
    packed, layout = experts.down_planes or experts.down_blocks, experts.down_layout
    inner = experts.inner_size
    return replace(
        experts,
        down_EMF=_numbers(experts.down_EMF, packed, layout, inner, dtype, chosen),
        down_planes=None,
        down_blocks=None,
        down_layout=None,
    )


def _numbers(
    stack_ENK: Tensor,
    packed: Planes | Weight | None,
    layout: PlaneLayout | None,
    cols: int,
    dtype: torch.dtype,
    chosen: Tensor | None,
) -> Tensor:
    """Returns a stack of experts, packed or not, as numbers: of all, or of `chosen`, int32."""
    rows = stack_ENK.shape[1]
    if packed is None:
        return stack_ENK if chosen is None else stack_ENK[chosen]
    if isinstance(packed, Weight):
        made = unpack_blocks(packed, dtype, chosen, rows)
    else:
        assert layout is not None
        planes = packed if chosen is None else packed.chosen(_rows_of(chosen, rows))
        made = unpack(planes, layout, cols, dtype)
    return made.view(-1, rows, cols)


def _rows_of(chosen: Tensor, rows: int) -> Tensor:
    """Returns the rows of matrices that have so many each."""
    each = torch.arange(rows, dtype=torch.int32, device=chosen.device)
    return (chosen[:, None] * rows + each).flatten()


def _biases_of(biases: ExpertBiases | None, chosen: Tensor | None) -> ExpertBiases | None:
    if biases is None or chosen is None:
        return biases
    parts = (biases.gate_EF, biases.up_EF, biases.down_EM)
    gate_EF, up_EF, down_EM = (one[chosen] for one in parts)
    return ExpertBiases(gate_EF=gate_EF, up_EF=up_EF, down_EM=down_EM)
