"""The launch shapes of products with packed weights. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.planes import BLOCK, RUN, PlaneLayout


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


RING_COLUMNS = 128
"""Of a tile of `tiles/hopper/ring.py`."""


class RingConstants(TypedDict):
    """What kernels of `tiles/hopper/ring.py` are launched with."""

    ROWS: int
    TOKENS: int
    STAGES: int
    TILES: int
    WIDE: bool
    EVEN_K: bool
    num_warps: int
    maxnreg: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """The launch shape of a product of some tokens on Hopper."""

    tokens: int
    rows: int
    num_warps: int
    stages: int
    """Steps that there is room for."""
    tiles: int
    """Of a step."""
    is_wide: bool
    """Four warps multiply together, which only groups of whole tiles can."""
    splits: int = 1
    """Programs that share a sum."""
    max_registers: int | None = None
    """Of a thread."""

    def constants(self, length: int) -> RingConstants:
        """Returns the arguments of a launch whose sums have `length` numbers."""
        return {
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "TILES": self.tiles,
            "WIDE": self.is_wide,
            "EVEN_K": length % RING_COLUMNS == 0,
            "num_warps": self.num_warps,
            "maxnreg": self.max_registers,
        }


PROCESSORS = 132
"""Of an H100."""
RINGS_BYTES = 216 << 10
"""Of the rings of all programs on one processor, which are two at least: the next kernel's may
come early."""


def ring_stages(layout: PlaneLayout, shape: RingShape, *, programs: int, num_tiles: int) -> int:
    """Returns for how many steps rings have room, where `programs` sum over so many tiles each: for
    all of them, if that much of every program fits a processor at once, and for no fewer than
    `shape` has."""
    # No fewer than there are of codes, high bits, scales and factors.
    row = layout.row_bytes(BLOCK) // 2 + (2 * RUN if layout.high else 0) + 4
    step = shape.tiles * (shape.rows * row + 2 * shape.tokens * RING_COLUMNS)
    room = RINGS_BYTES // max(2, -(-programs // PROCESSORS)) // step
    return max(shape.stages, min(room, -(-num_tiles // shape.tiles) + 1))


def splits_of(programs: int, num_tiles: int, wanted: int, least: int = 4) -> int:
    """Returns how many programs share a sum over so many tiles, so that there are about `wanted`
    instead of `programs`, and no fewer than `least` tiles for each."""
    return max(1, min(wanted // programs, num_tiles // least))


LONE_SPLITS = 8
"""Of a sum with one row of x at most: more take longer to be added than they save."""


def ring_shape(num_tokens: int, num_rows: int, length: int, layout: PlaneLayout) -> RingShape:
    """Returns the launch shape of a dense product on Hopper: measured on an H100
    (benchmarks/kernels/packed.py). Rows must be a multiple of 64."""
    can_wide = layout.group == RING_COLUMNS
    if num_tokens >= 192 and can_wide and num_rows % 128 == 0:
        return RingShape(tokens=128, rows=128, num_warps=8, stages=2, tiles=1, is_wide=True)
    tokens = max(8, min(64 if can_wide else 32, next_power_of_2(num_tokens)))
    programs = -(-num_tokens // tokens) * (num_rows // 64)
    wanted = 792 if tokens <= 16 else 396 if tokens == 32 else 198
    is_lone, num_tiles = num_tokens == 1, -(-length // RING_COLUMNS)
    splits = splits_of(programs, num_tiles, wanted)
    if is_lone:
        splits = min(LONE_SPLITS, splits_of(programs, num_tiles, wanted, least=2))
    shape = RingShape(
        tokens=tokens,
        rows=64,
        num_warps=4,
        stages=3 if is_lone else 4,
        tiles=8 // layout.bits if is_lone else 1,
        is_wide=tokens >= 32 and can_wide,
        splits=splits,
    )
    if not is_lone or splits == 1:
        return shape
    # Programs of a lone row are so short that all of them should be there at once.
    fits = ring_stages(
        layout,
        replace(shape, stages=2),
        programs=programs * splits,
        num_tiles=-(-num_tiles // splits),
    )
    return replace(shape, stages=min(shape.stages, fits))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShape:
    """The launch shape of a product of FP8 with FP8 and few tokens on Hopper."""

    tokens: int
    stages: int
    """Tiles of codes that there is room for."""
    splits: int
    """Programs that share a sum."""


FEW_ROWS = 64
"""Of a program of `hopper/fp8_few.py`."""
FEW_COLUMNS = 128
"""Of its tiles."""
FEW_BYTES = 208 << 10
"""Of the tiles and scales of a program."""


def few_shape(num_tokens: int, num_rows: int, steps: int) -> FewShape:
    """Returns the launch shape: all codes of a program are on their way at once where they fit."""
    tokens = max(8, min(64, next_power_of_2(num_tokens)))
    programs = -(-num_tokens // tokens) * (num_rows // FEW_ROWS)
    splits = 1
    while programs * splits <= 64 and steps % (2 * splits) == 0 and steps // splits > 8:
        splits *= 2
    steps //= splits
    scales = 4 * tokens * next_power_of_2(max(16, steps))
    room = (FEW_BYTES - scales) // ((FEW_ROWS + tokens) * FEW_COLUMNS)
    return FewShape(tokens=tokens, stages=min(steps, room, 16), splits=splits)


NUMBERS_COLUMNS = 64
"""Of the tiles of `hopper/few.py`, whose programs have as many rows."""


def few_numbers_shape(num_tokens: int, num_rows: int, steps: int) -> FewShape:
    """Returns the launch shape of `hopper/few.py` for `steps` tiles along a row, measured on an
    H200: some two programs a processor, all of them there at once."""
    tokens = max(8, min(64, next_power_of_2(num_tokens)))
    programs = -(-num_tokens // tokens) * (num_rows // NUMBERS_COLUMNS)
    most = 4 if tokens <= 16 else 2
    splits = max(1, min(2 * PROCESSORS // programs, steps // 8, most))
    at_once = max(2, -(-programs * splits // PROCESSORS))
    room = FEW_BYTES // at_once // ((NUMBERS_COLUMNS + tokens) * NUMBERS_COLUMNS * 2)
    return FewShape(tokens=tokens, stages=max(2, min(-(-steps // splits), room)), splits=splits)
