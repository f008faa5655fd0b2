"""Packed matrices as the planes that a device multiplies with, and what planes mean.

Made by placements on the device that they go to, and by tests. `octavo.planes` says which planes
there are, `block_rows.py` how rows of blocks become some.

Shape legend: R rows, K columns, G scales of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.formats import TWICE_E2M1
from octavo.planes import BLOCK, FP8_BLOCK, IQ4_VALUES, RUN, WORD_BITS, PlaneLayout

SCALE_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "e8m0": torch.uint8,
    "e4m3": torch.uint8,
    "i8": torch.int8,
    "u8": torch.uint8,
    "u4": torch.uint8,
}


class Planes(NamedTuple):
    """A packed matrix. What a layout has not is a tensor of no columns."""

    codes: Tensor
    """int16 [R, words of a row's codes]."""
    scales: Tensor
    """[R, G], of which a column lies in one piece; so do those of offsets and factors."""
    offsets: Tensor
    """[R, G]."""
    high: Tensor
    """int16 [R, words of the codes' high bits]."""
    factors: Tensor
    """[R, factors of a row]."""

    def rows(self, start: int, stop: int) -> Planes:
        """Returns a view of some rows."""
        return Planes(*(plane[start:stop] for plane in self))

    def chosen(self, rows: Tensor) -> Planes:
        """Returns some rows by their numbers, copied."""
        scales, offsets, factors = (
            plane.T[:, rows].T for plane in (self.scales, self.offsets, self.factors)
        )
        return Planes(self.codes[rows], scales, offsets, self.high[rows], factors)

    def columns(self, layout: PlaneLayout, start: int, stop: int) -> Planes:
        """Returns a view of some columns, whole steps of the layout or up to the end of a row."""
        assert start % layout.step == 0

        def part(plane: Tensor, count: int) -> Tensor:
            """Of a plane that has `count` columns in a step."""
            steps = slice(start // layout.step * count, layout.padded(stop) // layout.step * count)
            return plane[:, steps]

        step = layout.step
        by_block = layout.factor == "block"
        return Planes(
            part(self.codes, layout.words(step)),
            part(self.scales, layout.num_scales(step)) if layout.group else self.scales,
            part(self.offsets, layout.num_offsets(step)) if layout.group else self.offsets,
            part(self.high, layout.high_words(step)),
            part(self.factors, layout.num_factors(step)) if by_block else self.factors,
        )

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Returns what kernels take: the planes, and how far their columns are apart."""
        assert self.scales.stride(0) == 1 or len(self.scales) == 1
        return (*self, self.scales.stride(1))


def empty_planes(layout: PlaneLayout, rows: int, cols: int, device: torch.device) -> Planes:
    """Returns planes of a matrix that are yet to be filled."""
    scale_dtype = SCALE_DTYPES[layout.scale]

    def by_columns(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((columns, rows), dtype=dtype, device=device).T

    return Planes(
        torch.empty((rows, layout.words(cols)), dtype=torch.int16, device=device),
        by_columns(layout.num_scales(cols), scale_dtype),
        by_columns(
            layout.num_offsets(cols), torch.uint8 if layout.offset == "zero" else scale_dtype
        ),
        torch.empty((rows, layout.high_words(cols)), dtype=torch.int16, device=device),
        by_columns(
            layout.num_factors(cols), torch.float32 if layout.factor == "row" else torch.float16
        ),
    )


TILE_ROWS = 128


def has_tile_scales(planes: Planes, layout: PlaneLayout) -> bool:
    """Whether a matrix is FP8 whose scales by groups of columns are the same for every 128 rows
    too, as FP8 is published: what kernels of many tokens want to know. Looks at the scales."""
    if layout != FP8_BLOCK or len(planes.scales) % TILE_ROWS:
        return False
    tiles = planes.scales.view(-1, TILE_ROWS, planes.scales.shape[1])
    return torch.equal(tiles, tiles[:, :1].expand_as(tiles))


def pack_codes(layout: PlaneLayout, codes: Tensor) -> Tensor:
    """Returns the words int16 [R, words] of codes uint8 [R, padded columns], less high bits."""
    return _packed(codes & ((1 << layout.bits) - 1), layout.parts, layout.bits)


def pack_high(layout: PlaneLayout, codes: Tensor) -> Tensor:
    """Returns the words int16 [R, words] of the high bits of codes uint8 [R, padded columns]."""
    if not layout.high:
        return torch.empty((len(codes), 0), dtype=torch.int16, device=codes.device)
    return _packed(codes >> layout.bits, layout.parts * layout.runs, layout.high)


def _packed(codes: Tensor, parts: int, bits: int) -> Tensor:
    runs = codes.view(len(codes), -1, parts, RUN).to(torch.int32)
    return (runs << _shifts(bits, codes)).sum(2, dtype=torch.int32).to(torch.int16).flatten(1)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    runs = words.view(len(words), -1, 1, RUN).to(torch.int32)
    return ((runs >> _shifts(bits, words)) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=like.device)[:, None]


def unpack_codes(layout: PlaneLayout, words: Tensor, high: Tensor | None = None) -> Tensor:
    """Returns the codes uint8 [R, padded columns] of words int16 [R, words], with their high bits
    where those are given."""
    codes = _unpacked(words, layout.bits)
    if layout.high and high is not None:
        codes |= _unpacked(high, layout.high) << layout.bits
    return codes


def values_of(layout: PlaneLayout, planes: Planes, cols: int) -> Tensor:
    """Returns the float32 values [R, cols] of a packed matrix: what kernels are compared with."""
    codes = unpack_codes(layout, planes.codes, planes.high)
    if layout.values == "e4m3":
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif layout.values == "uint":
        numbers = codes.float() - layout.centre
    else:
        values = IQ4_VALUES if layout.values == "iq4" else [one / 2 for one in TWICE_E2M1]
        numbers = torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.int()]
    scales, minima = _scales(layout, planes)
    width = codes.shape[1] // scales.shape[1]
    if layout.offset == "zero":
        numbers = numbers - planes.offsets.float().repeat_interleave(width, 1)
    numbers = numbers * scales.repeat_interleave(width, 1)
    if minima is not None:
        numbers = numbers + minima.repeat_interleave(width, 1)
    return numbers[:, :cols]


def _scales(layout: PlaneLayout, planes: Planes) -> tuple[Tensor, Tensor | None]:
    """Returns the float32 scales [R, G], and the minima."""
    scales, minima = planes.scales, planes.offsets if layout.offset == "min" else None
    if layout.scale == "u4":
        scales, minima = scales & 15, scales >> 4
    elif layout.scale == "e8m0":
        scales = torch.exp2(scales.double() - 127)
    elif layout.scale == "e4m3":
        scales = scales.contiguous().view(torch.float8_e4m3fn)
    scales, minima = scales.float(), None if minima is None else minima.float()
    if layout.factor == "row":
        scales = scales * planes.factors
    elif layout.factor == "block":
        in_block = BLOCK // layout.group
        factors = planes.factors.float().repeat_interleave(in_block, 1)
        if minima is not None:
            factors, of_minima = (
                one.float().repeat_interleave(in_block, 1)
                for one in (planes.factors[:, ::2], planes.factors[:, 1::2])
            )
            minima = minima * of_minima * -1
        scales = scales * factors
    return scales, minima
