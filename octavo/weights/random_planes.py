"""Random packed weights, made as planes: for `--load-format dummy`, benchmarks and tests.

Called with planes on any device. Never makes the numbers that they stand for.
"""

from __future__ import annotations

import torch

from octavo.kernels.planes import Planes
from octavo.planes import FP8_BLOCK, PlaneLayout

E4M3_BELOW_2 = 0xBFBF
"""What two e4m3 numbers in a word keep if they are to be smaller than 2, and no NaN."""

_SMALL_SCALES = {
    **{"i8": (32, 64, 64.0), "u8": (32, 64, 64.0)},
    **{"u4": (0x88, 0x100, 16.0), "e4m3": (0x30, 0x38, 1.0)},
}
"""Of scales that are codes themselves: the least, the one after the largest, and its value."""


def fill_random(
    layout: PlaneLayout, planes: Planes, bound: float, generator: torch.Generator
) -> None:
    """Fills planes with random codes, and scales such that values lie in +-bound or nearly so."""
    for words in (planes.codes, planes.high):
        words.random_(-(1 << 15), 1 << 15, generator=generator)
    bits = layout.bits + layout.high
    if layout.values == "e4m3":
        planes.codes.bitwise_and_(E4M3_BELOW_2 - (1 << 16))
    largest = {"e4m3": 2.0, "e2m1": 6.0, "iq4": 127.0, "uint": float(1 << bits - 1)}[layout.values]
    scale = bound / largest
    if layout.scale in _SMALL_SCALES:
        low, high, unit = _SMALL_SCALES[layout.scale]
        planes.scales.random_(low, high, generator=generator)
        planes.offsets.random_(low, high, generator=generator)
        planes.factors.fill_(scale / unit)
        if layout.offset == "min":  # as much is taken off as the middle code has
            planes.factors[:, 1::2].mul_(largest)
    elif layout.scale == "e8m0":
        planes.scales.fill_(127 + round(torch.tensor(scale).log2().item()))
    else:
        planes.scales.uniform_(scale / 2, scale, generator=generator)
    if layout == FP8_BLOCK:  # As published ones are: a scale for so many rows too.
        rows = torch.arange(len(planes.scales), device=planes.scales.device)
        planes.scales.copy_(planes.scales[rows // layout.group * layout.group])
    if layout.offset == "zero":
        middle = 1 << bits - 1
        planes.offsets.random_(middle - 1, middle + 1, generator=generator)
    elif layout.offset == "min" and layout.factor == "none":
        planes.offsets.fill_(-scale * largest)
