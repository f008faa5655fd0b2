"""Packed experts made numbers, for steps of so many tokens that this is little beside them.

Called by `choose.py`. What it returns lives as long as the layer runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.product.packed import unpack
from octavo.planes import PlaneLayout


def unpacked_experts(experts: StackedExperts, dtype: torch.dtype) -> StackedExperts:
    """Returns the experts with all matrices as numbers of `dtype`."""

    def numbers(planes: Planes, layout: PlaneLayout, cols: int) -> Tensor:
        return unpack(planes, layout, cols, dtype).view(experts.count, -1, cols)

    made = experts
    if experts.gate_layout is not None:
        assert experts.gate_up_planes is not None
        gate, up = (
            numbers(planes, experts.gate_layout, experts.hidden_size)
            for planes in experts.gate_up_planes
        )
        made = replace(made, gate_EFM=gate, up_EFM=up, gate_up_planes=None, gate_layout=None)
    if experts.down_layout is not None:
        assert experts.down_planes is not None
        down = numbers(experts.down_planes, experts.down_layout, experts.inner_size)
        made = replace(made, down_EMF=down, down_planes=None, down_layout=None)
    return made
