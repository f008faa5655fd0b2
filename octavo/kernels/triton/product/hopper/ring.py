"""Dense products with packed weights for some tokens, on Hopper.

Called by `choose.py` where `fits` says so and no row is to be invariant. How codes are read stands
in `tiles/hopper/ring.py`.

Shape legend: T tokens, M columns of the weight, N rows.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.planes import Planes
from octavo.kernels.triton.launching.chip import cdiv, has_wgmma
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.numbers import TL_DTYPES
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.launching.tickets import room_for_splits
from octavo.kernels.triton.product.packed_shapes import RingShape
from octavo.kernels.triton.tiles.hopper.ring import (
    columns_of_split,
    is_aligned,
    ring_sums,
    takes,
    x_rows_layout,
)
from octavo.kernels.triton.tiles.hopper.splits import store_product
from octavo.planes import PlaneLayout


@launchable
@gluon.jit(do_not_specialize=["num_tokens"])
def ring_product_kernel(
    x_TM,
    planes,
    bias_N,
    out_TN,
    sums_STN,
    tickets,
    num_tokens,
    num_rows,
    hidden_size,
    out_stride,
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
    """out[t, n] = sum over m of x[t, m] * weight[n, m] (+ bias[n]).

    x_TM [T, M] contiguous, planes of a weight [N, M], out_TN [T, N] with a row stride, bias_N [N]
    any float. SPLITS as in `sum_of_splits`, sums_STN and tickets for it. LONE: T is 1.
    """
    WARPS: gl.constexpr = gl.num_warps()
    num_blocks = (num_tokens + TOKENS - 1) // TOKENS
    first_token = gl.program_id(0) % num_blocks * TOKENS
    first_row = gl.program_id(0) // num_blocks * ROWS
    token = first_token + gl.arange(0, TOKENS, x_rows_layout(WARPS))
    begin, end = columns_of_split(hidden_size, SPLITS, FORMAT)
    x_row = 0 * token if LONE else token
    total = ring_sums(
        *(x_TM, x_row, token < num_tokens, (planes, planes), first_row, hidden_size),
        *(begin, end, ROWS, TOKENS, STAGES, TILES, WIDE, EVEN_K, False, LONE, COMPUTE, FORMAT),
        OVERLAP,
    )
    store_product(
        *(total, out_TN, bias_N, bias_N, sums_STN, tickets, first_row, first_token, num_rows),
        *(num_tokens, out_stride, SPLITS, False, HAS_BIAS),
    )


def fits(x_TM: Tensor, planes: Planes, layout: PlaneLayout) -> bool:
    """Whether the kernel here can multiply x of a dtype and device with a weight; never depends on
    how many rows x has."""
    if x_TM.element_size() != 2 or not has_wgmma(x_TM.device):
        return False
    is_whole = len(planes.codes) % 64 == 0 and takes(layout, x_TM.shape[1])
    return is_whole and is_aligned(planes)


def ring_product(
    x_TM: Tensor,
    planes: Planes,
    layout: PlaneLayout,
    bias_N: Tensor | None,
    out_TN: Tensor,
    shape: RingShape,
    tickets: Tensor | None = None,
) -> None:
    """Writes x @ weight.T (+ bias) to `out_TN`, whose rows may be strided. `tickets`: see
    `make_tickets`; for shapes that split the sum."""
    num_tokens, hidden_size = x_TM.shape
    num_rows = len(planes.codes)
    assert out_TN.shape == (num_tokens, num_rows)
    assert x_TM.is_contiguous()
    if num_tokens == 0:
        return
    grid = cdiv(num_tokens, shape.tokens) * (num_rows // shape.rows)
    parts = room_for_splits(x_TM, shape.splits, out_TN.shape, grid, tickets)
    ring_product_kernel[(grid, shape.splits)](
        x_TM,
        planes.arguments(),
        x_TM if bias_N is None else bias_N,
        out_TN,
        *parts,
        num_tokens,
        num_rows,
        hidden_size,
        out_TN.stride(0),
        SPLITS=shape.splits,
        LONE=num_tokens == 1,
        **shape.constants(hidden_size),
        HAS_BIAS=bias_N is not None,
        COMPUTE=TL_DTYPES[x_TM.dtype],
        FORMAT=layout.name,
        **launch_options(x_TM.device),
    )
