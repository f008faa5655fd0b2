"""The experts of some pairs made numbers, where no kernel multiplies with them as they are.

Called by `choose_packed.py`. What it returns lives as long as the layer runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.product.grids import unpack_blocks
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.weights import ExpertBiases, Weight
from octavo.planes import PlaneLayout


def chosen_experts(
    experts: StackedExperts, topk_ids: Tensor, dtype: torch.dtype
) -> tuple[StackedExperts, Tensor]:
    """Returns experts as numbers, and ids among them that stand for `topk_ids`: where pairs are
    fewer than experts, an expert for each pair."""
    if topk_ids.numel() >= experts.count:
        return _unpacked(experts, dtype, None), topk_ids
    flat = topk_ids.flatten()
    places = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    ids = torch.where(flat >= 0, places, -1).view(topk_ids.shape)
    return _unpacked(experts, dtype, flat.clamp(min=0)), ids


def _unpacked(experts: StackedExperts, dtype: torch.dtype, chosen: Tensor | None) -> StackedExperts:
    """Returns experts with all matrices as numbers: all of them, or those of the ids `chosen`,
    int32, in their order."""
    count = experts.count if chosen is None else len(chosen)

    def matrix(
        stack_ENK: Tensor, packed: Planes | Weight | None, layout: PlaneLayout | None, cols: int
    ) -> Tensor:
        rows = stack_ENK.shape[1]
        if packed is None:
            return stack_ENK if chosen is None else stack_ENK[chosen]
        if isinstance(packed, Weight):
            made = unpack_blocks(packed, dtype, chosen, rows)
        else:
            assert layout is not None
            planes = packed if chosen is None else packed.chosen(_rows_of(chosen, rows))
            made = unpack(planes, layout, cols, dtype)
        return made.view(count, rows, cols)

    gate, up = experts.gate_up_planes or experts.gate_up_blocks or (None, None)
    down = experts.down_planes or experts.down_blocks
    hidden, inner = experts.hidden_size, experts.inner_size
    return replace(
        experts,
        gate_EFM=matrix(experts.gate_EFM, gate, experts.gate_layout, hidden),
        up_EFM=matrix(experts.up_EFM, up, experts.gate_layout, hidden),
        down_EMF=matrix(experts.down_EMF, down, experts.down_layout, inner),
        **dict.fromkeys(("gate_up_planes", "gate_layout", "down_planes", "down_layout")),
        **dict.fromkeys(("gate_up_blocks", "down_blocks")),
        biases=_biases_of(experts.biases, chosen),
    )


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
