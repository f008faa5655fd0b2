"""How packed weights lie on a device: planes of codes, scales and offsets, each of whole rows.

A value is (v(code) - zero) * scale + minimum: `PlaneLayout` says what each of them is. Read by
placements, kernels and plans. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Values = Literal["uint", "e4m3", "e2m1", "iq4"]
Scale = Literal["f16", "bf16", "f32", "e8m0", "e4m3", "i8", "u8", "u4"]
Offset = Literal["none", "zero", "min"]
Factor = Literal["none", "row", "block"]

RUN = 16
"""Codes lie in words of 16 bits, RUN of them together: word w has the codes of columns w, w + RUN,
... of as many as they hold, the first in the lowest bits. So what threads load at once meets
neighbours of x, and a pair of words becomes pairs of floats without shuffles."""
WORD_BITS = 16
BLOCK = 256
"""Columns that share a factor of their scales, in layouts that have one by blocks."""
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes "iq4" mean; ggml's."""
_SCALE_BYTES: dict[Scale, int] = {"f16": 2, "bf16": 2, "f32": 4}
"""Those of more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneLayout:
    """One way to lay out a packed matrix [rows, cols]. Rows of codes follow each other; of every
    other plane the columns do, so that neighbouring rows have neighbouring scales."""

    name: str
    bits: Literal[2, 4, 8]
    """Of a code, in the plane of codes."""
    high: Literal[0, 1, 2] = 0
    """Bits more of a code, above those, in a plane of their own: of the codes of as many runs of
    words as fill one, which lie one after the other from the lowest bits on."""
    values: Values
    """What a code is: a number without sign, a small float, or a place in a table."""
    group: int
    """Columns that share a scale; 0: a whole row does."""
    scale: Scale
    """The numbers of a scale; "u4": the low half of a byte, whose high half is the minimum's."""
    offset: Offset = "none"
    """What there is one of for each scale: a zero (a byte), or a minimum (of the scale's type)."""
    factor: Factor = "none"
    """What scales are multiplied with: a float32 for each row, or a float16 for each block, and
    another for the minima, which then are taken off."""
    centre: int = 0
    """The zero of all codes, where it is one number."""

    @property
    def parts(self) -> int:
        """Codes in a word."""
        return WORD_BITS // self.bits

    @property
    def runs(self) -> int:
        """Runs of words whose codes have their high bits in one run of them."""
        return WORD_BITS // (self.high * self.parts) if self.high else 1

    @property
    def is_summed(self) -> bool:
        """Whether products of several rows multiply sums by scales, rather than numbers."""
        return self.group == 0 or self.group >= 64

    @property
    def unit(self) -> int:
        """Columns that share nothing with others but a factor."""
        return max(self.group or 128, RUN * self.parts * self.runs)

    @property
    def step(self) -> int:
        """Columns that a row is a multiple of in memory; what is not used of them means nothing."""
        return max(BLOCK if self.factor == "block" else 0, self.unit)

    def padded(self, cols: int) -> int:
        """Returns the columns that a row of `cols` has in memory."""
        return -(-cols // self.step) * self.step

    def words(self, cols: int) -> int:
        """Returns the words of a row's codes."""
        return self.padded(cols) // self.parts

    def high_words(self, cols: int) -> int:
        """Returns the words of the high bits of a row's codes."""
        return self.padded(cols) * self.high // WORD_BITS

    def num_scales(self, cols: int) -> int:
        """Returns the scales of a row of `cols` columns."""
        return self.padded(cols) // self.group if self.group else 1

    def num_offsets(self, cols: int) -> int:
        """Returns the offsets of a row that are not in its scales' plane."""
        is_apart = self.offset != "none" and self.scale != "u4"
        return self.num_scales(cols) if is_apart else 0

    def num_factors(self, cols: int) -> int:
        """Returns the factors of a row: of each block one, or that of the minima after it."""
        if self.factor == "block":
            return self.padded(cols) // BLOCK * (2 if self.offset == "min" else 1)
        return 1 if self.factor == "row" else 0

    def row_bytes(self, cols: int) -> int:
        """Returns the bytes of a row in all planes."""
        codes = 2 * (self.words(cols) + self.high_words(cols))
        scales = self.num_scales(cols) * _SCALE_BYTES.get(self.scale, 1)
        offset_bytes = 1 if self.offset == "zero" else _SCALE_BYTES.get(self.scale, 1)
        factors = self.num_factors(cols) * (4 if self.factor == "row" else 2)
        return codes + scales + self.num_offsets(cols) * offset_bytes + factors


def _table(*layouts: PlaneLayout) -> dict[str, PlaneLayout]:
    return {one.name: one for one in layouts}


FP8_ROW = PlaneLayout(name="fp8_row", bits=8, values="e4m3", group=0, scale="f32")
"""FP8 whose scales are the same along a row: by tensor or channel."""
FP8_BLOCK = PlaneLayout(name="fp8", bits=8, values="e4m3", group=128, scale="f32")
_GGUF = (
    PlaneLayout(name="q8_0", bits=8, values="uint", group=32, scale="f16", centre=128),
    PlaneLayout(name="q4_0", bits=4, values="uint", group=32, scale="f16", centre=8),
    PlaneLayout(name="q4_1", bits=4, values="uint", group=32, scale="f16", offset="min"),
    PlaneLayout(name="q5_0", bits=4, high=1, values="uint", group=32, scale="f16", centre=16),
    PlaneLayout(name="q5_1", bits=4, high=1, values="uint", group=32, scale="f16", offset="min"),
    PlaneLayout(
        name="q2_k", bits=2, values="uint", group=16, scale="u4", offset="min", factor="block"
    ),
    PlaneLayout(
        name="q3_k", bits=2, high=1, values="uint", group=16, scale="i8", factor="block", centre=4
    ),
    PlaneLayout(
        name="q4_k", bits=4, values="uint", group=32, scale="u8", offset="min", factor="block"
    ),
    PlaneLayout(
        name="q5_k",
        bits=4,
        high=1,
        values="uint",
        group=32,
        scale="u8",
        offset="min",
        factor="block",
    ),
    PlaneLayout(
        name="q6_k", bits=4, high=2, values="uint", group=16, scale="i8", factor="block", centre=32
    ),
    PlaneLayout(name="iq4_nl", bits=4, values="iq4", group=32, scale="f16"),
    PlaneLayout(name="iq4_xs", bits=4, values="iq4", group=32, scale="i8", factor="block"),
    PlaneLayout(name="mxfp4", bits=4, values="e2m1", group=32, scale="e8m0"),
    PlaneLayout(name="nvfp4", bits=4, values="e2m1", group=16, scale="e4m3", factor="row"),
)
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
    *_GGUF,
)
"""By the name of the weight format that is laid out so; `fp8_row` is fp8 too."""


def plane_layout(name: str) -> PlaneLayout | None:
    """Returns how a device lays out weights of a format, None where it keeps none of them."""
    return PLANE_LAYOUTS.get(name)
