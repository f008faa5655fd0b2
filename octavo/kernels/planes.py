"""Packed rows taken apart into the planes that a device multiplies with, and what planes mean.

Called by placements once a matrix, on the device that it goes to, and by tests. `octavo.planes`
says which planes there are.

Shape legend: R rows, K columns, B blocks of a row, G scales of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.formats import TWICE_E2M1
from octavo.planes import RUN, PlaneLayout

SCALE_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "e8m0": torch.uint8,
}


class Planes(NamedTuple):
    """A packed matrix. What a layout has not is a tensor of no columns."""

    codes: Tensor
    """int16 [R, words of a row's codes]."""
    scales: Tensor
    """[R, G]."""
    offsets: Tensor
    """[R, G]."""

    def rows(self, start: int, stop: int) -> Planes:
        """Returns a view of some rows."""
        return Planes(*(plane[start:stop] for plane in self))

    def columns(self, layout: PlaneLayout, start: int, stop: int) -> Planes:
        """Returns a view of some columns, whole steps of the layout or up to the end of a row."""
        assert start % layout.step == 0
        codes = self.codes[:, start // layout.parts : layout.padded(stop) // layout.parts]
        if layout.group == 0:
            return Planes(codes, self.scales, self.offsets)
        groups = slice(start // layout.group, layout.padded(stop) // layout.group)
        return Planes(codes, self.scales[:, groups], self.offsets[:, groups])


def empty_planes(layout: PlaneLayout, rows: int, cols: int, device: torch.device) -> Planes:
    """Returns planes of a matrix that are yet to be filled."""
    scales, scale_dtype = layout.num_scales(cols), SCALE_DTYPES[layout.scale]
    offset_dtype = torch.uint8 if layout.offset == "zero" else scale_dtype
    shape = rows, 0 if layout.offset == "none" else scales
    return Planes(
        torch.empty((rows, layout.words(cols)), dtype=torch.int16, device=device),
        torch.empty((rows, scales), dtype=scale_dtype, device=device),
        torch.empty(shape, dtype=offset_dtype, device=device),
    )


def pack_codes(layout: PlaneLayout, codes: Tensor) -> Tensor:
    """Returns the words int16 [R, words] of codes uint8 [R, padded columns]."""
    runs = codes.view(len(codes), -1, layout.parts, RUN).to(torch.int32)
    shifts = torch.arange(0, 16, layout.bits, dtype=torch.int32, device=codes.device)[:, None]
    return (runs << shifts).sum(2, dtype=torch.int32).to(torch.int16).flatten(1)


def unpack_codes(layout: PlaneLayout, words: Tensor) -> Tensor:
    """Returns the codes uint8 [R, padded columns] of words int16 [R, words]."""
    runs = words.view(len(words), -1, 1, RUN).to(torch.int32)
    shifts = torch.arange(0, 16, layout.bits, dtype=torch.int32, device=words.device)[:, None]
    return ((runs >> shifts) & (1 << layout.bits) - 1).to(torch.uint8).flatten(1)


def planes_of(layout: PlaneLayout, rows: Tensor, block_bytes: int, cols: int) -> Planes:
    """Returns the planes of packed rows uint8 [R, B * block_bytes], as in `octavo.formats`."""
    blocks = rows.view(len(rows), -1, block_bytes)
    width = SCALE_DTYPES[layout.scale].itemsize
    scales = blocks[..., :width].contiguous().view(SCALE_DTYPES[layout.scale]).flatten(1)
    offsets = scales[:, :0]
    if layout.offset == "zero":
        offsets = blocks[..., width].contiguous()
        width += 1
    elif layout.offset == "min":
        offsets = blocks[..., width : 2 * width].contiguous().view(scales.dtype).flatten(1)
        width *= 2
    codes = blocks[..., width:]
    if layout.bits == 4:  # byte i of 16 has the codes of columns i and i + 16
        codes = codes.unflatten(-1, (-1, 16))
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    codes = codes.flatten(1)
    if layout.name == "q8_0":  # two's complement
        codes = codes ^ 0x80
    if layout.group == 0:
        scales = scales[:, :1].contiguous()
    missing = layout.padded(cols) - codes.shape[1]
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
        wanted = layout.num_scales(cols) - scales.shape[1]
        scales = torch.nn.functional.pad(scales, (0, wanted))
        if layout.offset != "none":
            offsets = torch.nn.functional.pad(offsets, (0, wanted))
    return Planes(pack_codes(layout, codes), scales, offsets)


def values_of(layout: PlaneLayout, planes: Planes, cols: int) -> Tensor:
    """Returns the float32 values [R, cols] of a packed matrix: what kernels are compared with."""
    codes = unpack_codes(layout, planes.codes)
    if layout.values == "e4m3":
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif layout.values == "e2m1":
        table = torch.tensor(TWICE_E2M1, dtype=torch.float32, device=codes.device) / 2
        numbers = table[codes.int()]
    else:
        numbers = codes.float() - layout.centre
    scales = planes.scales
    if layout.scale == "e8m0":
        scales = torch.exp2(scales.double() - 127)
    width = codes.shape[1] // scales.shape[1]
    scales = scales.float().repeat_interleave(width, 1)
    offsets = planes.offsets.float().repeat_interleave(width, 1)
    if layout.offset == "zero":
        numbers = numbers - offsets
    numbers = numbers * scales
    return (numbers + offsets if layout.offset == "min" else numbers)[:, :cols]
