"""The launch shapes of products with packed weights. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.planes import PlaneLayout


class BlockConstants(TypedDict):
    """How a sum over a packed row goes on."""

    BLOCK_K: int
    EVEN_K: bool


def block_constants(layout: PlaneLayout, block_k: int, length: int) -> BlockConstants:
    """Returns the constants of a sum over `length` columns, by about `block_k` at a time: units of
    the layout, and never beyond the end of a row."""
    unit = layout.unit
    steps = math.gcd(max(1, block_k // unit), layout.padded(length) // unit)
    return {"BLOCK_K": steps * unit, "EVEN_K": length % layout.step == 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedShape:
    """The launch shape of a product of some tokens."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsShape:
    """The launch shape of a product of one token."""

    block_n: int
    words: int
    num_warps: int


SHARED_BYTES = 100 << 10
"""Of what is on its way to a program: two of them fit a processor."""


def stages_within(layout: PlaneLayout, most: int, *, rows: int, block_t: int, block_k: int) -> int:
    """Returns how many blocks of BLOCK_K columns may be on their way at once, `most` at most: of so
    many rows of the weights and of x."""
    words = 2 if layout.high else 1  # those of high bits come with every run of words
    columns = max(block_k, layout.unit)
    weights = rows * words * 2 * columns // layout.parts
    return max(2, min(most, SHARED_BYTES // (weights + block_t * columns * 2)))


def packed_shape(num_tokens: int, layout: PlaneLayout) -> PackedShape:
    """Returns the launch shape of a dense product."""
    block_t = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    stages = stages_within(layout, 4, rows=64, block_t=block_t, block_k=128)
    return PackedShape(block_t=block_t, block_n=64, block_k=128, num_warps=4, num_stages=stages)


def sums_shape(layout: PlaneLayout, hidden_size: int) -> SumsShape:
    """Returns the launch shape of a product of one token."""
    step = max(16, min(512, next_power_of_2(layout.words(hidden_size))))
    return SumsShape(block_n=8 if layout.bits == 4 else 2, words=step, num_warps=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Shape:
    """The launch shape of a product of FP8 with FP8."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def fp8_shape(num_tokens: int) -> Fp8Shape:
    """Returns the launch shape of a dense product."""
    if num_tokens <= 64:
        return Fp8Shape(block_t=64, block_n=128, block_k=128, num_warps=4, num_stages=4)
    return Fp8Shape(block_t=128, block_n=256, block_k=128, num_warps=8, num_stages=3)
