"""Rows times a Hadamard matrix, in place: how queries come to the basis of keys that are stored
mixed, and sums of values back from it.

Called by the attention of both kinds for formats of the KV cache that are mixed (`kv_codec.mix`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv_write import mixed

ELEMENTS = 1024
"""Of a program."""


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _mix_kernel(
    x,
    num_rows,
    stride_t,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x[t, h] = mix(x[t, h]) for ROWS of the rows t * H + h."""
    wait_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = x + (row // H * stride_t + row % H * stride_h)[:, None] + d[None, :]
    mask = (row < num_rows)[:, None] & (d < D)[None, :]
    y = mixed(tl.load(at, mask=mask, other=0.0).to(tl.float32), D, True)
    tl.store(at, y.to(x.dtype.element_ty), mask=mask)


def mix_rows(x_THD: Tensor) -> None:
    """Mixes each row of x [T, H, D] in place; columns lie side by side, rows may be apart."""
    num_tokens, num_heads, size = x_THD.shape
    assert x_THD.stride(2) == 1, x_THD.stride()
    if num_tokens == 0:
        return
    block_d = next_power_of_2(size)
    rows = max(1, ELEMENTS // block_d)
    _mix_kernel[(cdiv(num_tokens * num_heads, rows),)](
        x_THD,
        num_tokens * num_heads,
        x_THD.stride(0),
        x_THD.stride(1),
        H=num_heads,
        D=size,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=4,
        **launch_options(x_THD.device),
    )
