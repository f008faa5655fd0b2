"""How packed weights lie on a device: planes of codes, scales and offsets, each a matrix by rows.

A value is (v(code) - zero) * scale + minimum: `PlaneLayout` says what each of them is. Read by
placements, kernels and plans. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Values = Literal["uint", "e4m3", "e2m1"]
Scale = Literal["f16", "bf16", "f32", "e8m0"]
Offset = Literal["none", "zero", "min"]

RUN = 16
"""Codes lie in words of 16 bits, RUN of them together: word w has the codes of columns w, w + RUN,
... of as many as they hold, the first in the lowest bits. So what threads load at once meets
neighbours of x, and a pair of words becomes pairs of floats without shuffles."""
WORD_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneLayout:
    """One way to lay out a packed matrix [rows, cols]. Rows of every plane follow each other."""

    name: str
    bits: Literal[4, 8]
    """Of a code."""
    values: Values
    """What a code is: a number without sign, or a small float."""
    group: int
    """Columns that share a scale; 0: a whole row does."""
    scale: Scale
    offset: Offset = "none"
    """What there is one of for each scale: a zero (a byte), or a minimum (of the scale's type)."""
    centre: int = 0
    """The zero of all codes, where it is one number."""

    @property
    def parts(self) -> int:
        """Codes in a word."""
        return WORD_BITS // self.bits

    @property
    def step(self) -> int:
        """Columns that a row is a multiple of in memory; what is not used of them means nothing."""
        return max(self.group or 128, RUN * self.parts)

    def padded(self, cols: int) -> int:
        """Returns the columns that a row of `cols` has in memory."""
        return -(-cols // self.step) * self.step

    def words(self, cols: int) -> int:
        """Returns the words of a row's codes."""
        return self.padded(cols) // self.parts

    def num_scales(self, cols: int) -> int:
        """Returns the scales of a row of `cols` columns."""
        return self.padded(cols) // self.group if self.group else 1

    def row_bytes(self, cols: int) -> int:
        """Returns the bytes of a row in all planes."""
        width = {"e8m0": 1, "f16": 2, "bf16": 2, "f32": 4}[self.scale]
        per_scale = width + {"none": 0, "zero": 1, "min": width}[self.offset]
        return 2 * self.words(cols) + self.num_scales(cols) * per_scale


def _table(*layouts: PlaneLayout) -> dict[str, PlaneLayout]:
    return {one.name: one for one in layouts}


FP8_ROW = PlaneLayout(name="fp8_row", bits=8, values="e4m3", group=0, scale="f32")
"""FP8 whose scales are the same along a row: by tensor or channel."""
FP8_BLOCK = PlaneLayout(name="fp8", bits=8, values="e4m3", group=128, scale="f32")
PLANE_LAYOUTS: dict[str, PlaneLayout] = _table(
    FP8_ROW,
    FP8_BLOCK,
    *(
        PlaneLayout(
            name=f"int4_{group}_{scale}",
            bits=4,
            values="uint",
            group=group,
            scale=scale,
            offset="zero",
        )
        for group in (32, 64, 128)
        for scale in ("f16", "bf16")
    ),
    *(
        PlaneLayout(
            name=f"int8_{group}", bits=8, values="uint", group=group, scale="f32", offset="zero"
        )
        for group in (32, 64, 128)
    ),
    PlaneLayout(name="q8_0", bits=8, values="uint", group=32, scale="f16", centre=128),
    PlaneLayout(name="q4_0", bits=4, values="uint", group=32, scale="f16", centre=8),
    PlaneLayout(name="q4_1", bits=4, values="uint", group=32, scale="f16", offset="min"),
    PlaneLayout(name="mxfp4", bits=4, values="e2m1", group=32, scale="e8m0"),
)
"""By the name of the weight format that is laid out so; `fp8_row` is fp8 too."""


def plane_layout(name: str) -> PlaneLayout | None:
    """Returns how a device lays out weights of a format, None where it keeps none of them."""
    return PLANE_LAYOUTS.get(name)
