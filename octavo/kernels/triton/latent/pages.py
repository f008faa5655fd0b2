"""The pages of latent attention: one row a token, its latent vector and its rotated key columns.

Read by the kernels of this folder, written by `write`. Heads have no pages of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_pages(
    pages,
    table_row,
    n,
    live,
    stride_block,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Returns the latent vectors [N, BLOCK_R] and the rotated columns [N, BLOCK_E] at positions n,
    0 where not live and beyond their widths."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    page = tl.load(table_row + n // P, mask=live, other=0).to(tl.int64)
    at = page * stride_block + (n % P) * (RANK + ROPE)
    mask_r = live[:, None]
    if RANK != BLOCK_R:
        mask_r = mask_r & (offs_r < RANK)[None, :]
    mask_e = live[:, None]
    if ROPE != BLOCK_E:
        mask_e = mask_e & (offs_e < ROPE)[None, :]
    c = tl.load(pages + at[:, None] + offs_r[None, :], mask=mask_r, other=0.0)
    r = tl.load(pages + (at + RANK)[:, None] + offs_e[None, :], mask=mask_e, other=0.0)
    return c, r


def block_stride(pages_BPC: Tensor) -> int:
    """Returns the elements between blocks, after checking that a page [P, C] is contiguous."""
    _, block_size, columns = pages_BPC.shape
    if pages_BPC.stride()[1:] != (columns, 1):
        raise ValueError(
            f"latent pages must be views [B, {block_size}, {columns}] with contiguous pages, got "
            f"strides {pages_BPC.stride()}"
        )
    return pages_BPC.stride(0)
