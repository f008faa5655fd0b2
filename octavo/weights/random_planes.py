"""Random packed weights, made as planes: for `--load-format dummy`, benchmarks and tests.

Called with planes on any device. Never makes the numbers that they stand for.
"""

from __future__ import annotations

import torch

from octavo.kernels.planes import Planes
from octavo.planes import PlaneLayout

E4M3_BELOW_2 = 0xBFBF
"""What two e4m3 numbers in a word keep if they are to be smaller than 2, and no NaN."""


def fill_random(
    layout: PlaneLayout, planes: Planes, bound: float, generator: torch.Generator
) -> None:
    """Fills planes with random codes, and scales such that values lie in +-bound or nearly so."""
    planes.codes.random_(-(1 << 15), 1 << 15, generator=generator)
    if layout.values == "e4m3":
        planes.codes.bitwise_and_(E4M3_BELOW_2 - (1 << 16))
        largest = 2.0
    elif layout.values == "e2m1":
        largest = 6.0
    else:
        largest = 1 << layout.bits - 1
    scale = bound / largest
    if layout.scale == "e8m0":
        planes.scales.fill_(127 + round(torch.tensor(scale).log2().item()))
    else:
        planes.scales.uniform_(scale / 2, scale, generator=generator)
    if layout.offset == "zero":
        middle = 1 << layout.bits - 1
        planes.offsets.random_(middle - 1, middle + 1, generator=generator)
    elif layout.offset == "min":
        planes.offsets.fill_(-scale * largest)
