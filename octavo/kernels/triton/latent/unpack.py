"""Latent vectors of some sequences side by side, as plain numbers, for the expanded form.

Called by expand.py, which multiplies keys and values of the heads out of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.latent.pages import LatentPlane, latent_tile
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import has_vector_scales, is_mixed, vector_scales
from octavo.kernels.triton.tiles.kv_write import mixed

TOKENS = 8
"""Of a program."""


@launchable
@triton.jit(do_not_specialize=["first_position", "num_positions"])
def _unpack_latents_kernel(
    out,
    pages,
    scales,
    stride_block,
    stride_scales,
    which,
    starts,
    lows,
    ends,
    block_table,
    first_position,
    num_positions,
    stride_table,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N of the num_positions positions from lows[sequence] + first_position on of sequence
    which[program 1], up to ends[sequence], go to rows starts[sequence] .. of out [N, RANK + ROPE],
    the first RANK columns no longer mixed. which < 0: nothing."""
    wait_turn(OVERLAP)
    sequence = tl.load(which + tl.program_id(1)).to(tl.int64)
    if sequence < 0:
        return
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.load(lows + sequence) + first_position + i
    live = (i < num_positions) & (n < tl.load(ends + sequence))
    page = tl.load(block_table + sequence * stride_table + n // P, mask=live, other=0).to(tl.int64)
    plane = (pages, scales, stride_block, stride_scales, 0)
    c, r = latent_tile(plane, page, n % P, live, tl.float32, RANK, ROPE, FORMAT, BLOCK_R, BLOCK_E)
    if has_vector_scales(FORMAT):
        c = c * vector_scales(plane, page, n % P, live, 2, True)[:, None]
        r = r * vector_scales(plane, page, n % P, live, 2, True, 1)[:, None]
    c = mixed(c, RANK, is_mixed(FORMAT))
    d, e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    row = tl.load(starts + sequence).to(tl.int64) + i
    at = out + row[:, None] * (RANK + ROPE)
    here = live[:, None]
    tl.store(at + d[None, :], c.to(out.dtype.element_ty), mask=here & (d < RANK)[None, :])
    tl.store(at + RANK + e[None, :], r.to(out.dtype.element_ty), mask=here & (e < ROPE)[None, :])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """A range of positions of some sequences. int32 tensors."""

    which: Tensor
    """Those sequences; -1 where there are no more."""
    starts_S: Tensor
    """The row of each one's first position in the range."""
    lows_S: Tensor
    """The position that the range counts from."""
    ends_S: Tensor
    """Where a sequence's positions end, whatever the range."""
    num_rows: int
    positions: tuple[int, int]
    """[first, beyond), counted from `lows_S`."""


def unpacked_latents(
    plane: LatentPlane, block_table: Tensor, gathered: Gathered, dtype: torch.dtype
) -> Tensor:
    """Returns [num_rows, rank + rope] of `dtype`: what the cache keeps of the positions; rows that
    nobody has hold anything."""
    num_columns, which = plane.rank + plane.rope_size, gathered.which
    first, beyond = gathered.positions
    out_NC = torch.empty(gathered.num_rows, num_columns, dtype=dtype, device=which.device)
    _unpack_latents_kernel[(cdiv(beyond - first, TOKENS), len(which))](
        out_NC,
        *plane.arguments,
        *(which, gathered.starts_S, gathered.lows_S, gathered.ends_S, block_table),
        *(first, beyond - first, block_table.stride(0)),
        **plane.constants,
        BLOCK_R=max(16, next_power_of_2(plane.rank)),
        BLOCK_N=TOKENS,
        num_warps=4,
        **launch_options(which.device),
    )
    return out_NC
