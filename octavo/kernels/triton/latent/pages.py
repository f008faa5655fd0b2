"""The pages of latent attention: one row a token, its latent vector and its rotated key columns.

Read by the kernels of this folder, written by `write`. Heads have no pages of their own. In formats
with scales both parts have their own: two a token, of int4 one for 32 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import KVLayer
from octavo.kernels.kv_codec import stored_format
from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.tiles.kv import has_vector_scales, key_scores, kv_tile, vector_scales


@triton.jit
def latent_tile(
    plane, page, inside, live, dtype: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Returns the latent vectors [N, BLOCK_R] and the rotated columns [N, BLOCK_E] of tokens
    `inside` [N] of pages `page`: as `kv_tile`."""
    COLUMNS: tl.constexpr = RANK + ROPE
    PACKED: tl.constexpr = 2 if FORMAT == "int4" else 1
    c = kv_tile(plane, page, inside, live, dtype, COLUMNS, RANK, FORMAT, True, BLOCK_R)
    numbers, scales, stride, stride_scales, _ = plane
    rotated = (numbers + RANK // PACKED, scales, stride, stride_scales, RANK // 32)
    r = kv_tile(rotated, page, inside, live, dtype, COLUMNS, ROPE, FORMAT, True, BLOCK_E)
    return c, r


@triton.jit
def latent_scores(q, q_rope, c, r, plane, page, inside, live, FORMAT: tl.constexpr):
    """Returns scores [M, N] of queries with a `latent_tile`."""
    if has_vector_scales(FORMAT):
        s = key_scores(q, c, plane, page, inside, live, 2, FORMAT, True)
        of_r = tl.dot(q_rope.to(r.dtype), tl.trans(r), input_precision="ieee")
        s = s + of_r * vector_scales(plane, page, inside, live, 2, True, 1)[None, :]
    else:
        s = tl.dot(q.to(c.dtype), tl.trans(c), input_precision="ieee")
        s = tl.dot(q_rope.to(r.dtype), tl.trans(r), s, input_precision="ieee")
    return s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentPlane:
    """A layer's pages, as kernels are launched on them."""

    numbers: Tensor
    """[B, P, C] or, of int4, [B, P, C / 2]."""
    scales: Tensor
    format: str
    """FORMAT of tiles/kv.py."""
    rank: int
    rope_size: int

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """Numbers, scales, the elements between pages of both."""
        return self.numbers, self.scales, self.numbers.stride(0), self.scales.stride(0)

    @property
    def constants(self) -> dict[str, int | str]:
        """FORMAT, RANK, ROPE, P and BLOCK_E."""
        return {
            "FORMAT": self.format,
            "RANK": self.rank,
            "ROPE": self.rope_size,
            "P": self.block_size,
            "BLOCK_E": max(16, next_power_of_2(self.rope_size)),
        }

    @property
    def block_size(self) -> int:
        return self.numbers.shape[1]

    @property
    def is_plain(self) -> bool:
        return self.format == "numbers"

    @property
    def is_mixed(self) -> bool:
        return self.format == "int4"

    def dtype_with(self, q: Tensor) -> torch.dtype:
        """Returns what products with queries are made in: see `KVPlanes.dtype`."""
        is_known = not self.is_plain or q.dtype == self.numbers.dtype
        return q.dtype if is_known else torch.float32


def latent_plane(layer: KVLayer, rank: int, rope_size: int) -> LatentPlane:
    """Returns the plane of a layer. Raises ValueError unless its pages are whole and in one
    piece."""
    numbers, scales = layer.planes["latent"], layer.planes.get("latent_scale")
    columns = rank + rope_size
    if scales is None:
        _check("latent", numbers, columns)
        scales, format = numbers, "numbers"
    else:
        stored = stored_format(numbers)
        _check("latent", numbers, columns * stored.bits // 8)
        _check("latent_scale", scales, stored.num_scales(rank) + stored.num_scales(rope_size))
        if rope_size & (rope_size - 1):
            raise ValueError(f"{stored.name} takes a power of two rotated columns, not {rope_size}")
        format = stored.name
    return LatentPlane(
        numbers=numbers, scales=scales, format=format, rank=rank, rope_size=rope_size
    )


def _check(name: str, pages: Tensor, width: int) -> None:
    _, block_size, columns = pages.shape
    if columns != width or pages.stride()[1:] != (width, 1):
        raise ValueError(
            f"{name} pages must be views [B, {block_size}, {width}] with contiguous pages, got "
            f"shape {tuple(pages.shape)}, strides {pages.stride()}"
        )
