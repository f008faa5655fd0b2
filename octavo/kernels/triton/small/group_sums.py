"""The sums of x over each group of columns, for products with packed weights.

Called before them, once for all weights that x meets in one layout (`tiles/packed.py` says why).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.scales import has_sums
from octavo.planes import PlaneLayout

COLUMNS = 2048
"""That a program sums."""


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def group_sums_kernel(
    x_TM,
    sums_GT,
    num_rows,
    length,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """sums[g, t] = sum of x[t, g * GROUP : (g + 1) * GROUP], float32; x_TM [T, M] contiguous."""
    wait_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_TM + row * length + column, mask=column < length, other=0.0)
    sums = tl.sum(x.to(tl.float32), 1)
    tl.store(sums_GT + group.to(tl.int64) * num_rows + row, sums, mask=group < num_groups)


def group_sums(x_TM: Tensor, layout: PlaneLayout | None) -> Tensor:
    """Returns float32 [G, T], or anything where products in the layout do not ask for it."""
    if layout is None or not has_sums(layout.name):
        return x_TM
    num_rows, length = x_TM.shape
    assert x_TM.is_contiguous()
    count = layout.num_scales(length)
    sums = torch.empty((count, num_rows), dtype=torch.float32, device=x_TM.device)
    groups = COLUMNS // layout.group
    group_sums_kernel[(num_rows, cdiv(count, groups))](
        x_TM,
        sums,
        num_rows,
        length,
        count,
        GROUP=layout.group,
        GROUPS=groups,
        num_warps=4,
        **launch_options(x_TM.device),
    )
    return sums
