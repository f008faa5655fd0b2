"""The launch shapes of a MoE layer, by the number of tokens and the sizes of the layer.

Asked by `tuning/shapes.py` where nothing was tuned, obeyed by `grouped.py` and `pairs.py`. Pure
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.product.packed_shapes import (
    RING_COLUMNS,
    Fp8Shape,
    RingShape,
    SumsShape,
    block_constants,
    ring_stages,
    splits_of,
    stages_within,
)
from octavo.kernels.triton.product.shapes import RowsShape, step_of
from octavo.planes import PlaneLayout


class TileConstants(TypedDict):
    """What a grouped product is launched with."""

    BLOCK_N: int
    BLOCK_K: int
    STAGES: int
    GROUP: int
    TMA: bool
    EVEN_K: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """The launch shape of one product."""

    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def constants(
        self, length: int, *, is_tma: bool, layout: PlaneLayout | None = None
    ) -> TileConstants:
        """Returns the arguments of a launch whose sums have `length` numbers, or packed ones."""
        block = block_constants(layout, self.block_k, length) if layout else None
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k if block is None else block["BLOCK_K"],
            "STAGES": self.num_stages,
            "GROUP": self.group,
            "TMA": is_tma,
            "EVEN_K": length % self.block_k == 0 if block is None else block["EVEN_K"],
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """The launch shapes of one MoE layer."""

    is_direct: bool
    """Pairs go one by one (`pairs.py`), where no batch invariance is promised."""
    block_p: int
    gate_up: TileShape
    down: TileShape

    def of_floats(self) -> ExpertsShape:
        """Returns the shape for float32: blocks of as many bytes."""
        gate_up = replace(self.gate_up, block_k=self.gate_up.block_k // 2)
        return replace(
            self, gate_up=gate_up, down=replace(self.down, block_k=self.down.block_k // 2)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsShape:
    """The launch shapes of `pairs.py`."""

    gate_up: RowsShape
    down: RowsShape


def experts_shape(
    num_tokens: int, top_k: int, num_experts: int, inner_size: int, *, can_tma: bool
) -> ExpertsShape:
    """Returns the launch shapes: measured on an H100 (benchmarks/kernels/experts.py).

    Reading experts is what costs below some 64 tokens an expert, so blocks are low there; a pair
    goes its own way while two tokens seldom share an expert. Bits depend on `is_direct` alone.
    """
    mean = num_tokens * top_k / num_experts
    is_long = inner_size >= 4096
    if num_tokens == 1 or (num_tokens == 2 and 16 * top_k <= num_experts):
        gate_up = _tile(32, 256, 3) if is_long else _tile(32, 128, 4)
        return ExpertsShape(is_direct=True, block_p=16, gate_up=gate_up, down=_tile(32, 128, 5))
    if mean <= 10:
        down = _tile(64, 256, 3) if is_long else _tile(64, 128, 4)
        return ExpertsShape(is_direct=False, block_p=16, gate_up=_tile(32, 256, 3), down=down)
    if mean <= 24:
        gate_up, down = _tile(64, 128, 3, group=4), _tile(128, 128, 3, group=4)
        return ExpertsShape(is_direct=False, block_p=32, gate_up=gate_up, down=down)
    if mean <= 48:
        gate_up, down = _tile(64, 128, 3, group=4), _tile(128, 64, 4, group=4)
        return ExpertsShape(is_direct=False, block_p=64, gate_up=gate_up, down=down)
    gate_up = TileShape(block_n=128, block_k=64, group=4, num_warps=8, num_stages=4, tma=can_tma)
    down = TileShape(block_n=256, block_k=64, group=8, num_warps=8, num_stages=4, tma=can_tma)
    return ExpertsShape(is_direct=False, block_p=128, gate_up=gate_up, down=down)


def pairs_shape(hidden_size: int, inner_size: int, top_k: int) -> PairsShape:
    """Returns the launch shapes of `gate_up_of_pair_kernel`, which reads two rows for each one, and
    of `down_and_combine_kernel`: all choices of a step together."""
    block_k = step_of(inner_size, 256)
    return PairsShape(
        gate_up=RowsShape(block_n=1, block_k=step_of(hidden_size, 2048), num_warps=4),
        down=RowsShape(block_n=2 if top_k <= 8 else 1, block_k=block_k, num_warps=4),
    )


def _tile(block_n: int, block_k: int, num_stages: int, group: int = 1) -> TileShape:
    return TileShape(
        block_n=block_n, block_k=block_k, group=group, num_warps=4, num_stages=num_stages
    )


def packed_experts_shape(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    gate: PlaneLayout | None,
    down: PlaneLayout | None,
) -> ExpertsShape:
    """Returns the launch shapes of experts whose weights are packed, or some of them. Deterministic
    sums need no others: bits depend on `is_direct` alone."""
    mean = num_tokens * top_k / num_experts
    is_direct = num_tokens == 1 or (num_tokens == 2 and 16 * top_k <= num_experts)
    block_p = 16 if mean <= 12 else 32 if mean <= 48 else 64
    group = 1 if mean <= 12 else 4

    def tile(layout: PlaneLayout | None, matrices: int) -> TileShape:
        if layout is None:
            return _tile(64, 128, 3, group)
        block_k = 256 if layout.bits == 8 and mean <= 12 else 128
        rows = 64 * matrices
        stages = stages_within(layout, 4, rows=rows, block_t=block_p, block_k=block_k)
        return _tile(64, block_k, stages, group)

    return ExpertsShape(
        is_direct=is_direct, block_p=block_p, gate_up=tile(gate, 2), down=tile(down, 1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPairsShape:
    """The launch shapes of `pairs.py` where weights are packed."""

    gate_up: SumsShape
    down: SumsShape


def packed_pairs_shape(
    gate: PlaneLayout, down: PlaneLayout, hidden_size: int, inner_size: int, top_k: int
) -> PackedPairsShape:
    """Returns the launch shapes of the kernels of `pairs.py` where weights are packed."""
    of_gate = min(512, next_power_of_2(gate.words(hidden_size)))
    of_down = min(512 if top_k <= 2 else 128, next_power_of_2(down.words(inner_size)))
    if gate.values == "e4m3" and top_k > 2:  # whole rows are on their way at once
        of_gate = min(1024, next_power_of_2(gate.words(hidden_size)))
    return PackedPairsShape(
        gate_up=SumsShape(
            block_n=4 if gate.bits == 4 and inner_size >= 4096 else 2,
            words=max(16, of_gate),
            num_warps=2 if inner_size >= 4096 else 4,
        ),
        down=SumsShape(
            block_n=2 if top_k <= 2 or down.bits == 8 else 4,
            words=max(16, of_down),
            num_warps=2 if top_k <= 2 and down.bits == 4 else 4,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RingExpertsShape:
    """The launch shapes of `hopper/ring.py`."""

    gate_up: RingShape
    down: RingShape
    is_lone: bool
    """Each pair has programs of its own."""


def ring_experts_shape(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    inner_size: int,
    gate: PlaneLayout,
    down: PlaneLayout,
    *,
    is_lone: bool,
) -> RingExpertsShape:
    """Returns the launch shapes of experts with packed weights on Hopper: measured on an H100
    (benchmarks/kernels/packed.py). Sizes must be multiples of 64.

    What is on its way to a processor, and how many programs it has, decide: steps are of two tiles,
    since pieces of 64 bytes take memory longer than those of 128, and rings no deeper than needed:
    all of a lone pair's rows where they fit, else so that more programs do.
    """
    num_pairs = num_tokens * top_k
    mean = num_pairs / num_experts
    can_wide = gate.group == down.group == RING_COLUMNS and hidden_size % 128 == 0
    is_plain = gate.bits == 4 and not gate.high
    most_of_16 = 20 if is_plain and not can_wide else 10
    tokens = 8 if is_lone or mean <= 4 else 16 if mean <= most_of_16 else 32
    if mean > 10 and can_wide:
        return _wide_rings(32 if mean <= 24 else 64, gate, down)
    blocks = min(num_pairs, num_experts)
    programs = blocks * (hidden_size // 64)
    gate_tiles, down_tiles = (-(-one // RING_COLUMNS) for one in (hidden_size, inner_size))
    splits = splits_of(programs, down_tiles, 1056 if is_lone else 528)
    of_gate, of_down = (
        RingShape(tokens=tokens, rows=64, num_warps=4, stages=2, tiles=8 // one.bits, is_wide=False)
        for one in (gate, down)
    )
    if is_lone:
        stages = ring_stages(
            gate, of_gate, programs=blocks * (inner_size // 32), num_tiles=gate_tiles
        )
        of_gate = replace(of_gate, stages=stages)
        stages = ring_stages(
            down, of_down, programs=programs * splits, num_tiles=-(-down_tiles // splits)
        )
        of_down = replace(of_down, stages=stages)
    else:
        of_down = replace(of_down, stages=3 if can_wide else 2)
        if tokens <= 16 and (can_wide or is_plain):
            of_gate = replace(of_gate, rows=128, max_registers=128)
        if can_wide and tokens == 16 and gate.bits == down.bits == 4:
            of_down = replace(of_down, rows=128, stages=2, max_registers=128)
            splits = splits_of(programs // 2, down_tiles, 528)
    return RingExpertsShape(gate_up=of_gate, down=replace(of_down, splits=splits), is_lone=is_lone)


def _wide_rings(tokens: int, gate: PlaneLayout, down: PlaneLayout) -> RingExpertsShape:
    """Returns the shapes whose warps multiply together, of blocks of so many pairs."""

    def ring(layout: PlaneLayout, *, is_down: bool) -> RingShape:
        is_four = layout.bits == 4
        is_large = tokens == 64 or (is_down and is_four)
        return RingShape(
            tokens=tokens,
            rows=128 if is_large else 64,
            num_warps=8 if is_large else 4,
            stages=2 if is_four else 3,
            tiles=2 if is_four else 1,
            is_wide=True,
            max_registers=128 if is_large else None,
        )

    return RingExpertsShape(
        gate_up=ring(gate, is_down=False), down=ring(down, is_down=True), is_lone=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8ExpertsShape:
    """The launch shapes of `fp8.py`."""

    rows: int
    """Of a block of pairs."""
    gate_up: Fp8Shape
    down: Fp8Shape


def fp8_experts_shape(num_tokens: int, top_k: int, num_experts: int) -> Fp8ExpertsShape:
    """Returns the launch shapes of FP8 weights with FP8 activations."""
    rows = 64 if num_tokens * top_k <= 64 * num_experts else 128
    return Fp8ExpertsShape(
        rows=rows,
        gate_up=Fp8Shape(block_t=rows, block_n=128, block_k=128, num_warps=8, num_stages=4),
        down=Fp8Shape(block_t=rows, block_n=256, block_k=128, num_warps=8, num_stages=3),
    )
