"""The experts of a MoE layer on Hopper where FP8 weights meet FP8 activations.

Called by `choose.py`. As `grouped.py` where pairs are sorted; tokens are rounded once, in the order
of the pairs, and what is between the two products in the first one's end, where scales go by
blocks. Takes silu and sizes that 128 and 256 divide, without biases.

Shape legend: T tokens, P pairs (token, choice), R places of pairs in order, E experts, M hidden,
F expert hidden, G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.activations import Activation
from octavo.kernels.planes import Planes
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.sort import SortedPairs, sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import has_wgmma, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.small.quantize import Fp8Rows, quantize_rows
from octavo.kernels.triton.tiles.hopper.fp8 import (
    CONSUMER_REGISTERS,
    HALF,
    PRODUCER_REGISTERS,
    TILE,
    bring,
    make_rings,
    place_of,
    scaled_sums,
    sums_layout,
    tiles_of,
)
from octavo.kernels.triton.tiles.hopper.fp8_ends import (
    in_words,
    rounded,
    silu_times,
    store_rows,
    wide_layout,
)

UNSPECIALISED = ["num_blocks", "num_places", "steps", "columns"]


@gluon.jit
def _used_blocks(blocks_3B, num_blocks):
    """Returns how many blocks there are, as those say that are none."""
    last = blocks_3B + (num_blocks - 1)
    return gl.where(gl.load(last) < 0, gl.load(last + 2 * num_blocks), num_blocks)


@gluon.jit
def _piece(unit, columns, work):
    """Returns (expert, first place, end place, column block) of a unit of work."""
    blocks_3B, num_blocks, used = work
    block, column = place_of(unit, used, columns)
    at = blocks_3B + block
    return gl.load(at), gl.load(at + num_blocks), gl.load(at + 2 * num_blocks), column


@gluon.jit
def _produce(
    IS_GATED: gl.constexpr, AT_ONCE: gl.constexpr, OVERLAP: gl.constexpr, x, first, second,
    num_rows, steps, columns, units, work, rings,
):  # fmt: skip
    """Keeps the rings full. Weights and blocks were there before the kernel before this one."""
    base = units * 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, row, _, column = _piece(unit, columns, work)
        if IS_GATED:
            at = expert * num_rows + column * TILE
            bring(x, first, second, row, at, at, steps, base, rings, OVERLAP, AT_ONCE)
        else:
            at = expert * num_rows + column * (2 * TILE)
            bring(
                *(x, first, second, row, at, at + TILE, steps, base, rings),
                *(OVERLAP, AT_ONCE),
            )
        base += steps
    if OVERLAP:
        gdc_wait()


@gluon.jit
def _consume(
    HALF_OF: gl.constexpr, ROWS: gl.constexpr, IS_FEW: gl.constexpr, IS_GATED: gl.constexpr,
    BY_BLOCK: gl.constexpr, BY_TILE: gl.constexpr, OVERLAP: gl.constexpr, x_scales, first_scales,
    second_scales, out, out_scales, weights, order, num_places, num_rows, scale_stride, out_stride,
    steps, columns, units, work, rings,
):  # fmt: skip
    """Multiplies the pieces, of a half of their rows where those are many."""
    COUNT: gl.constexpr = ROWS if IS_FEW else HALF
    WEIGHTS: gl.constexpr = 0 if IS_FEW else 1
    SUMS: gl.constexpr = sums_layout(ROWS, IS_FEW)
    WIDE: gl.constexpr = wide_layout(IS_FEW)
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    base = units * 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, start, end, column = _piece(unit, columns, work)
        start += HALF_OF * HALF
        row = start + gl.arange(0, COUNT, gl.SliceLayout(WEIGHTS, SUMS))
        first_row = expert.to(gl.int64) * num_rows
        if IS_GATED:
            first_row += column * TILE
            second_row = first_row
        else:
            first_row += column * (2 * TILE)
            second_row = first_row + TILE
        if not IS_GATED:  # Asked for before the sums, which take longer.
            pair = gl.load(order + row, mask=row < end, other=0)
            weight = gl.load(weights + pair, mask=row < end, other=0.0)
        scales = x_scales, first_scales + first_row, second_scales + second_row, scale_stride
        one, two = scaled_sums(
            *(HALF_OF, ROWS, IS_FEW, BY_BLOCK, BY_TILE, row, num_places, scales),
            *(steps, base, rings),
        )
        base += steps
        place = start + gl.arange(0, COUNT, gl.SliceLayout(WEIGHTS, WIDE))
        live = place < end
        if IS_GATED:
            value = silu_times(one, two)
            if BY_BLOCK:
                value, scale = rounded(value, WEIGHTS)
                at = out_scales + column.to(gl.int64) * num_places + row
                gl.store(at, scale, mask=row < end)
                value = in_words(value, WEIGHTS)
            value = value.to(out.dtype.element_ty)
            store_rows(out, value, place, live, out_stride, column * TILE, IS_FEW)
        else:
            to = gl.load(order + place, mask=live, other=0)
            of_pair = gl.expand_dims(weight, WEIGHTS)
            at = column * (2 * TILE)
            one, two = (
                (one * of_pair).to(out.dtype.element_ty),
                (two * of_pair).to(out.dtype.element_ty),
            )
            store_rows(out, one, to, live, out_stride, at, IS_FEW)
            store_rows(out, two, to, live, out_stride, at + TILE, IS_FEW)


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def fp8_pieces_kernel(
    x,
    first,
    second,
    x_scales,
    first_scales,
    second_scales,
    out,
    out_scales,
    weights_P,
    order_P,
    blocks_3B,
    num_blocks,
    num_places,
    num_rows,
    scale_stride,
    out_stride,
    steps,
    columns,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    AT_ONCE: gl.constexpr,
    IS_FEW: gl.constexpr,
    IS_GATED: gl.constexpr,
    BY_BLOCK: gl.constexpr,
    BY_TILE: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The products of experts' rows: gated, out[r] = silu(x[r] @ gate[e].T) * (x[r] @ up[e].T), by
    blocks in e4m3 with scales [F / 128, R]; else out[p] = weights[p] * x[r] @ down[e].T for the
    pair p in place r.

    x descriptor of e4m3 [R, K] in boxes [ROWS or HALF, TILE]; first and second of weights e4m3
    [E * num_rows, K] in boxes [TILE, TILE]: gate and up, or both the same; x_scales [G or 1, R];
    those of weights by columns, `scale_stride` apart; BY_TILE: see `scaled_sums`. `columns`: tiles
    of a row of out. One warp asks for tiles, one or two warpgroups multiply.
    """
    rings = make_rings(x.dtype, ROWS, IS_FEW, STAGES)
    used = _used_blocks(blocks_3B, num_blocks)
    units = used * columns
    work = (blocks_3B, num_blocks, used)
    source = (x, first, second, num_rows, steps, columns, units, work, rings)
    rest = (x_scales, first_scales, second_scales, out, out_scales, weights_P, order_P, num_places,
            num_rows, scale_stride, out_stride, steps, columns, units, work, rings)  # fmt: skip
    if ROWS <= HALF:
        gl.warp_specialize(
            [
                (_consume, (0, ROWS, IS_FEW, IS_GATED, BY_BLOCK, BY_TILE, OVERLAP) + rest),
                (_produce, (IS_GATED, AT_ONCE, OVERLAP) + source),
            ],
            [1],
            [REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, ROWS, IS_FEW, IS_GATED, BY_BLOCK, BY_TILE, OVERLAP) + rest),
                (_consume, (1, ROWS, IS_FEW, IS_GATED, BY_BLOCK, BY_TILE, OVERLAP) + rest),
                (_produce, (IS_GATED, AT_ONCE, OVERLAP) + source),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, REGISTERS],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecesShape:
    """How many rows of x a piece has, and how many steps are on their way to a program."""

    rows: int
    stages: int
    is_few: bool
    box: int = 128
    """Rows of weights that are asked for at once."""
    at_once: int = 1
    """Steps whose weights are asked for together."""
    max_registers: int | None = None
    """Of a thread. Half of what there are let a program come while the kernel before still runs."""


SHAPES = (
    PiecesShape(rows=16, stages=6, is_few=True, box=32, at_once=2, max_registers=128),
    PiecesShape(rows=32, stages=5, is_few=True, box=32, at_once=2, max_registers=128),
    PiecesShape(rows=64, stages=5, is_few=False),
    PiecesShape(rows=128, stages=4, is_few=False),
)


def pieces_shape(num_pairs: int, num_experts: int) -> PiecesShape:
    """Returns the launch shape of the products of pairs: the least that most experts' rows fit."""
    mean = num_pairs / num_experts
    return next((shape for shape in SHAPES if mean <= 0.7 * shape.rows), SHAPES[-1])


def fits(x_TM: Tensor, experts: StackedExperts, activation: Activation, num_pairs: int) -> bool:
    """Whether the kernel here can take the experts; never looks at values."""
    gate, down = experts.gate_layout, experts.down_layout
    return (
        experts.is_fp8
        and gate == down
        and activation == "silu"
        and experts.biases is None
        and experts.hidden_size % (2 * TILE.value) == 0
        and experts.inner_size % TILE.value == 0
        and x_TM.dtype in (torch.bfloat16, torch.float16)
        and (experts.has_tile_scales or pieces_shape(num_pairs, experts.count).is_few)
        and has_wgmma(x_TM.device)
    )


def hopper_fp8_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    *,
    in_parts: bool = False,
) -> Tensor:
    """Returns what `grouped_experts` does, activations rounded to FP8."""
    assert experts.gate_up_planes is not None
    assert experts.down_planes is not None
    layout = experts.gate_layout
    assert layout is not None
    num_tokens, hidden_size = x_TM.shape
    num_pairs, by_block = topk_ids.numel(), layout.group > 0
    shape = pieces_shape(num_pairs, experts.count)
    pairs = sort_pairs(topk_ids, experts.count, shape.rows)
    x = quantize_rows(x_TM, hidden_size, by_block=by_block, places_P=pairs.places_P)
    hidden = _gate_up(x, experts, pairs, topk_weights, shape, x_TM.dtype)
    del x  # Its memory is needed for the parts.
    parts = x_TM.new_empty((num_pairs, hidden_size))
    down = experts.down_planes
    rest = hidden_size, parts, hidden.scales, pairs, topk_weights, shape
    _launch(hidden, (down, down), *rest, experts, is_gated=False)
    if in_parts:
        return parts.view(num_tokens, -1, hidden_size)
    return combine(parts, topk_ids, experts.count, 0)


def _gate_up(
    x: Fp8Rows,
    experts: StackedExperts,
    pairs: SortedPairs,
    topk_weights: Tensor,
    shape: PiecesShape,
    dtype: torch.dtype,
) -> Fp8Rows:
    """Returns what is between the products; `dtype`: of numbers that are yet to be rounded."""
    assert experts.gate_up_planes is not None
    assert experts.gate_layout is not None
    num_pairs, inner = len(x.numbers), experts.inner_size
    by_block = experts.gate_layout.group > 0
    dtype = torch.float8_e4m3fn if by_block else dtype
    out = torch.empty((num_pairs, inner), dtype=dtype, device=x.numbers.device)
    scales = x.scales.new_empty((inner // TILE.value, num_pairs)) if by_block else x.scales
    rest = inner, out, scales, pairs, topk_weights, shape
    _launch(x, experts.gate_up_planes, *rest, experts, is_gated=True)
    return Fp8Rows(out, scales) if by_block else quantize_rows(out, inner, by_block=False)


def _launch(
    x: Fp8Rows,
    weights: tuple[Planes, Planes],
    num_rows: int,
    out: Tensor,
    out_scales: Tensor,
    pairs: SortedPairs,
    topk_weights: Tensor,
    shape: PiecesShape,
    experts: StackedExperts,
    *,
    is_gated: bool,
) -> None:
    first, second = weights
    num_blocks = pairs.blocks_3B.shape[1]
    columns = num_rows // TILE.value // (1 if is_gated else 2)
    units = num_blocks * columns
    fp8_pieces_kernel[(min(units, num_processors(out.device)),)](
        tiles_of(x.numbers, shape.rows if shape.is_few else HALF.value),
        tiles_of(first.codes, shape.box),
        tiles_of(second.codes, shape.box),
        x.scales,
        first.scales,
        second.scales,
        out,
        out_scales,
        topk_weights,
        pairs.order_P,
        pairs.blocks_3B,
        num_blocks,
        len(x.numbers),
        num_rows,
        first.scales.stride(1),
        out.stride(0),
        x.numbers.shape[1] // TILE.value,
        columns,
        ROWS=shape.rows,
        STAGES=shape.stages,
        AT_ONCE=shape.at_once,
        IS_FEW=shape.is_few,
        IS_GATED=is_gated,
        BY_BLOCK=experts.is_by_block,
        BY_TILE=experts.is_by_tile,
        REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=shape.max_registers,
        **launch_options(out.device),
    )
