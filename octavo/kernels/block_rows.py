"""Rows of blocks, as files and `octavo.formats` have them, taken apart into planes.

Called by placements once a matrix, on the device that it goes to, and by tests. A format's entry in
`_READERS` says where its blocks have codes, scales and what goes with them.

Shape legend: R rows, B blocks of a row, K columns, G scales of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from octavo.kernels.planes import Planes, pack_codes, pack_high
from octavo.planes import PlaneLayout


class Parts(NamedTuple):
    """What blocks [R, B, bytes] are made of."""

    codes: Tensor
    """uint8 [R, B, codes of a block]."""
    scales: Tensor
    """[R, B, scales of a block]."""
    offsets: Tensor | None = None
    """[R, B, scales of a block]."""
    factors: Tensor | None = None
    """[R, B, factors of a block]."""


def planes_of(
    layout: PlaneLayout, rows: Tensor, block_bytes: int, cols: int, table: Tensor | None = None
) -> Planes:
    """Returns the planes of packed rows uint8 [R, B * block_bytes], as in `octavo.formats`.
    `table`: that of the weight, if its format has one."""
    blocks = rows.view(len(rows), -1, block_bytes)
    parts = _READERS.get(layout.name, _own)(layout, blocks)
    codes, scales = parts.codes.flatten(1), parts.scales.flatten(1)
    offsets, factors = (
        scales[:, :0] if part is None else part.flatten(1)
        for part in (parts.offsets, parts.factors)
    )
    if layout.factor == "row":
        assert table is not None
        # What e4m3's 1 means; a table has halves, for values that are twice as large.
        factors = (table[0x38] * 2).to(rows.device).expand(len(rows), 1)
    if layout.group == 0:
        scales = scales[:, :1]
    wide = pad(codes, (0, layout.padded(cols) - codes.shape[1]))
    return Planes(
        pack_codes(layout, wide),
        _padded(scales, layout.num_scales(cols)),
        _padded(offsets, layout.num_offsets(cols)),
        pack_high(layout, wide),
        _padded(factors, layout.num_factors(cols)),
    )


def _padded(plane: Tensor, columns: int) -> Tensor:
    return pad(plane, (0, columns - plane.shape[1]))


def _numbers(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.contiguous().view(dtype)


def _halves(packed: Tensor, width: int) -> Tensor:
    """Returns codes of bytes [.., n], of which each `width` have so many codes in their low halves
    and then as many in their high ones."""
    runs = packed.unflatten(-1, (-1, width))
    return torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2)


def _planes_of_bits(packed: Tensor, width: int, bits: int) -> Tensor:
    """The same of codes of so few bits that each `width` bytes have several times as many."""
    runs = packed.unflatten(-1, (-1, width))
    parts = [(runs >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-2).flatten(-3)


def _own(layout: PlaneLayout, blocks: Tensor) -> Parts:
    """Octavo's formats: a scale, a zero where there is one, codes."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[layout.scale]
    width = dtype.itemsize
    scales, offsets = _numbers(blocks[..., :width], dtype), None
    if layout.offset == "zero":
        offsets = blocks[..., width : width + 1]
        width += 1
    codes = blocks[..., width:]
    return Parts(_halves(codes, 16) if layout.bits == 4 else codes, scales, offsets)


def _q8_0(layout: PlaneLayout, blocks: Tensor) -> Parts:
    return Parts(blocks[..., 2:] ^ 0x80, _numbers(blocks[..., :2], torch.float16))


def _legacy(layout: PlaneLayout, blocks: Tensor) -> Parts:
    """A scale, a minimum where there is one, fifth bits where there are some, halves of bytes."""
    scales, start, offsets = _numbers(blocks[..., :2], torch.float16), 2, None
    if layout.offset == "min":
        offsets = _numbers(blocks[..., 2:4], torch.float16)
        start = 4
    codes = _halves(blocks[..., -16:], 16)
    if layout.high:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        fifth = (blocks[..., start : start + 4, None] >> shifts) & 1
        codes = codes | fifth.flatten(-2) << 4
    return Parts(codes, scales, offsets)


def _mxfp4(layout: PlaneLayout, blocks: Tensor) -> Parts:
    return Parts(_halves(blocks[..., 1:], 16), blocks[..., :1])


def _nvfp4(layout: PlaneLayout, blocks: Tensor) -> Parts:
    scales = blocks[..., :4] & 0x7F  # without a sign; 0x7F means 0
    scales = torch.where(scales == 0x7F, torch.zeros_like(scales), scales)
    return Parts(_halves(blocks[..., 4:], 8), scales)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales and the minima, each uint8 [R, B, 8], of 12 bytes."""
    low, middle, both = packed.split(4, dim=-1)
    scales = torch.cat((low & 63, (both & 15) | ((low >> 2) & 48)), dim=-1)
    return scales, torch.cat((middle & 63, (both >> 4) | ((middle >> 2) & 48)), dim=-1)


def _q4_k(layout: PlaneLayout, blocks: Tensor) -> Parts:
    scales, minima = _six_bits(blocks[..., 4:16])
    codes = _halves(blocks[..., -128:], 32)
    if layout.high:
        codes = codes | _planes_of_bits(blocks[..., 16:48], 32, 1) << 4
    return Parts(codes, scales, minima, _numbers(blocks[..., :4], torch.float16))


def _q6_k(layout: PlaneLayout, blocks: Tensor) -> Parts:
    codes = _halves(blocks[..., :128], 64) | _planes_of_bits(blocks[..., 128:192], 32, 2) << 4
    factors = _numbers(blocks[..., 208:], torch.float16)
    return Parts(codes, _numbers(blocks[..., 192:208], torch.int8), None, factors)


def _q2_k(layout: PlaneLayout, blocks: Tensor) -> Parts:
    codes, factors = _planes_of_bits(blocks[..., 16:80], 32, 2), blocks[..., 80:]
    return Parts(codes, blocks[..., :16], None, _numbers(factors, torch.float16))


def _q3_k(layout: PlaneLayout, blocks: Tensor) -> Parts:
    codes = _planes_of_bits(blocks[..., 32:96], 32, 2)
    codes = codes | _planes_of_bits(blocks[..., :32], 32, 1) << 2
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    scales = torch.cat((low & 15, low >> 4), dim=-1) | _planes_of_bits(high, 4, 2) << 4
    scales = scales.to(torch.int8) - 32
    return Parts(codes, scales, None, _numbers(blocks[..., 108:], torch.float16))


def _iq4_xs(layout: PlaneLayout, blocks: Tensor) -> Parts:
    low = blocks[..., 4:8]
    low = torch.stack((low & 15, low >> 4), dim=-1).flatten(-2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[..., 2:4, None] >> shifts) & 3).flatten(-2)
    scales = (low | high << 4).to(torch.int8) - 32
    return Parts(
        _halves(blocks[..., 8:], 16), scales, None, _numbers(blocks[..., :2], torch.float16)
    )


_READERS: dict[str, Callable[[PlaneLayout, Tensor], Parts]] = {
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"), _legacy),
    **dict.fromkeys(("q4_k", "q5_k"), _q4_k),
    "q8_0": _q8_0,
    "q6_k": _q6_k,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
}
