"""Experts of many tokens on Hopper whose weights are numbers of 16 bits: both products of a layer.

Called by `unpacked.py` and `choose.py`. As `grouped.py` where pairs are sorted, and with its bits;
but rows of pairs are put in order first, so that all tiles come by TMA, which one warp asks for
while two warpgroups multiply. A piece of work is ROWS rows of x and two tiles of weights: those of
gate and up, or neighbours.

Shape legend: T tokens, P pairs (token, choice), R places of pairs in order, E experts, M hidden,
F expert hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.sort import SortedPairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import cdiv, has_wgmma, next_power_of_2, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.numbers import TL_DTYPES
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.activation import activation_constant, gated
from octavo.kernels.triton.tiles.hopper.fp8 import place_of
from octavo.kernels.triton.tiles.hopper.fp8_ends import store_rows, wide_layout

COLUMNS = gl.constexpr(64)
"""Of a step."""
TILE = gl.constexpr(128)
"""Rows of a tile of weights."""
HALF = gl.constexpr(64)
"""Rows of x of a warpgroup."""
ROWS = gl.constexpr(2 * HALF.value)
"""Of x, in a piece: those of a block of pairs."""
STAGES = 4
BRINGER_REGISTERS = 40
CONSUMER_REGISTERS = gl.constexpr(240)
MANY_ROWS = 512
"""Of an expert, in the mean: from here on these kernels are faster than those of `grouped.py`, if
experts are large enough that putting rows in order is little beside them."""
LARGE_INNER = 4096
_BOX_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
_BLOCKS = gl.constexpr(256)
"""Looked through at once for those of some experts."""


@launchable
@triton.jit
def rows_in_order_kernel(
    x_TM,
    places_P,
    out_RM,
    hidden_size,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[places[p]] = x[t] for every pair p of token t that has a place."""
    wait_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = column < hidden_size
    x = tl.load(x_TM + token * hidden_size + column, mask=is_in, other=0.0)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places_P + token * TOP_K + choice).to(tl.int64)
        tl.store(out_RM + place * hidden_size + column, x, mask=is_in & (place >= 0))


@gluon.jit
def _make_rings(dtype: gl.constexpr, S: gl.constexpr):
    """Returns (x, tiles, weights, full, empty): shared memory for S steps, with their barriers.
    Weights [S, 2 TILE, COLUMNS] are the tiles [2 S, TILE, COLUMNS], two by two."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    x = gl.allocate_shared_memory(dtype, [2 * S, HALF, COLUMNS], layout)
    tiles = gl.allocate_shared_memory(dtype, [2 * S, TILE, COLUMNS], layout)
    weights = tiles._reinterpret(dtype, [S, 2 * TILE, COLUMNS], layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], barrier)
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return x, tiles, weights, full, empty


@gluon.jit
def _blocks_of(blocks_3B, num_blocks, first_expert, num_experts):
    """Returns the first block of some experts, and how many they have; blocks are in the order of
    experts, and those that are none say -1."""
    begin, count = num_blocks * 0, num_blocks * 0
    for start in range(0, num_blocks, _BLOCKS):
        block = start + gl.arange(0, _BLOCKS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        expert = gl.load(blocks_3B + block, mask=block < num_blocks, other=-1)
        expert = gl.where(expert < 0, num_experts, expert - first_expert)
        begin += gl.sum((expert < 0).to(gl.int32), 0)
        count += gl.sum(((expert >= 0) & (expert < num_experts)).to(gl.int32), 0)
    return begin, count


@gluon.jit
def _piece(unit, columns, work):
    """Returns (expert, first place, end place, column block) of a unit of work."""
    blocks_3B, num_blocks, first_expert, begin, count = work
    block, column = place_of(unit, count, columns)
    at = blocks_3B + (begin + block)
    expert = gl.load(at) - first_expert
    return expert, gl.load(at + num_blocks), gl.load(at + 2 * num_blocks), column


@gluon.jit
def _bring(IS_GATED: gl.constexpr, OVERLAP: gl.constexpr, x, first, second, num_rows, steps,
           columns, units, work, rings):  # fmt: skip
    """Keeps the rings full."""
    x_ring, tiles, weights, full, empty = rings
    S: gl.constexpr = weights.shape[0]
    BYTES: gl.constexpr = (ROWS + 2 * TILE) * COLUMNS * 2
    if OVERLAP:
        gdc_wait()
    base = units * 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, row, _, column = _piece(unit, columns, work)
        if IS_GATED:
            first_row = expert * num_rows + column * TILE
            second_row = first_row
        else:
            first_row = expert * num_rows + column * (2 * TILE)
            second_row = first_row + TILE
        for step in range(steps):
            slot, turn = (base + step) % S, (base + step) // S
            barrier = full.index(slot)
            mbarrier.wait(empty.index(slot), turn & 1 ^ 1)
            mbarrier.expect(barrier, BYTES)
            for half in gl.static_range(2):
                at = [row + half * HALF, step * COLUMNS]
                tma.async_copy_global_to_shared(x, at, barrier, x_ring.index(2 * slot + half))
            at = [first_row, step * COLUMNS]
            tma.async_copy_global_to_shared(first, at, barrier, tiles.index(2 * slot))
            at = [second_row, step * COLUMNS]
            tma.async_copy_global_to_shared(second, at, barrier, tiles.index(2 * slot + 1))
        base += steps


@gluon.jit
def _multiply(HALF_OF: gl.constexpr, steps, base, rings):
    """Returns x @ first.T and x @ second.T [HALF, TILE] of a warpgroup's rows. A step is begun
    before the last one is done."""
    x_ring, _, weights, full, empty = rings
    S: gl.constexpr = weights.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * TILE, 16])
    total = gl.zeros([HALF, 2 * TILE], gl.float32, SUMS)
    for step in range(steps):
        slot = (base + step) % S
        mbarrier.wait(full.index(slot), (base + step) // S & 1)
        x = x_ring.index(2 * slot + HALF_OF)
        weight = weights.index(slot).permute((1, 0))
        total = warpgroup_mma(x, weight, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=(total,))
        if step > 0:
            mbarrier.arrive(empty.index((base + step - 1) % S))
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(empty.index((base + steps - 1) % S))
    return gl.split(total.reshape([HALF, 2, TILE]).permute((0, 2, 1)))


@gluon.jit
def _with_bias(sums, bias_EN, first):
    """Returns sums [rows, TILE] with biases that begin at `first`."""
    n = gl.arange(0, TILE, gl.SliceLayout(0, sums.type.layout))
    return sums + gl.load(bias_EN + (first + n)).to(gl.float32)[None, :]


@gluon.jit
def _consume(
    HALF_OF: gl.constexpr, IS_GATED: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, OVERLAP: gl.constexpr, first_bias, second_bias, out, weights, order,
    num_rows, steps, columns, units, work, rings,
):  # fmt: skip
    """Multiplies a half of the rows of every piece."""
    WIDE: gl.constexpr = wide_layout(False)
    if OVERLAP:
        gdc_wait()
    base = units * 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, start, end, column = _piece(unit, columns, work)
        start += HALF_OF * HALF
        one, two = _multiply(HALF_OF, steps, base, rings)
        base += steps
        place = start + gl.arange(0, HALF, gl.SliceLayout(1, WIDE))
        live = place < end
        if IS_GATED:
            if HAS_BIAS:
                of_expert = expert.to(gl.int64) * num_rows + column * TILE
                one = _with_bias(one, first_bias, of_expert)
                two = _with_bias(two, second_bias, of_expert)
            value = gated(one, two, ACTIVATION).to(out.dtype.element_ty)
            store_rows(out, value, place, live, num_rows, column * TILE, False)
        else:
            row = start + gl.arange(0, HALF, gl.SliceLayout(1, one.type.layout))
            pair = gl.load(order + row, mask=row < end, other=0)
            weight = gl.load(weights + pair, mask=row < end, other=0.0)
            to = gl.load(order + place, mask=live, other=0)
            column *= 2 * TILE
            made = (one * weight[:, None]).to(out.dtype.element_ty)
            store_rows(out, made, to, live, num_rows, column, False)
            made = (two * weight[:, None]).to(out.dtype.element_ty)
            store_rows(out, made, to, live, num_rows, column + TILE, False)


@launchable
@gluon.jit(do_not_specialize=["num_blocks", "first_expert", "num_experts", "steps", "columns"])
def many_kernel(
    x,
    first,
    second,
    first_bias_EN,
    second_bias_EN,
    out,
    weights_P,
    order_P,
    blocks_3B,
    num_blocks,
    first_expert,
    num_experts,
    num_rows,
    steps,
    columns,
    STAGES: gl.constexpr,
    IS_GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    COMPUTE: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The products of the rows of `num_experts` experts from `first_expert` on: IS_GATED,
    out[r] = act(x[r] @ gate[e].T, x[r] @ up[e].T), with biases before; else
    out[p] = weights[p] * x[r] @ down[e].T for the pair p in place r.

    x descriptor of [R, K] in boxes [HALF, COLUMNS]; first and second those of weights
    [E * num_rows, K] of just those experts in boxes [TILE, COLUMNS], gate and up, or both the same;
    biases [E, num_rows] any float. `columns`: pieces of a row of out; `steps`: K / COLUMNS.
    REGISTERS: of the threads that ask for tiles.
    """
    rings = _make_rings(COMPUTE, STAGES)
    # Blocks were written before the kernel whose end is waited for.
    begin, count = _blocks_of(blocks_3B, num_blocks, first_expert, num_experts)
    units = count * columns
    work = (blocks_3B, num_blocks, first_expert, begin, count)
    rest = (first_bias_EN, second_bias_EN, out, weights_P, order_P, num_rows, steps, columns, units,
            work, rings)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (0, IS_GATED, HAS_BIAS, ACTIVATION, OVERLAP) + rest),
            (_consume, (1, IS_GATED, HAS_BIAS, ACTIVATION, OVERLAP) + rest),
            (
                _bring,
                (IS_GATED, OVERLAP, x, first, second, num_rows, steps, columns, units, work, rings),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, REGISTERS],
    )


def fits(x_TM: Tensor, experts: StackedExperts, num_pairs: int) -> bool:
    """Whether the kernels here run experts on x for so many pairs, once those that are packed are
    numbers in the dtype of x."""
    gates = () if experts.is_packed_gate else (experts.gate_EFM, experts.up_EFM)
    downs = () if experts.is_packed_down else (experts.down_EMF,)
    return (
        x_TM.element_size() == 2
        and all(one.dtype == x_TM.dtype and one.is_contiguous() for one in gates + downs)
        and experts.inner_size >= LARGE_INNER
        and experts.inner_size % TILE.value == 0
        and experts.hidden_size % (2 * TILE.value) == 0
        and num_pairs >= MANY_ROWS * experts.count
        and has_wgmma(x_TM.device)
    )


def rows_in_order(x_TM: Tensor, pairs: SortedPairs) -> Tensor:
    """Returns the row of every pair [R, M] in the pairs' order, whose blocks have ROWS at most;
    pairs left out have none, and as many last rows hold anything."""
    assert pairs.block_p == ROWS.value
    num_tokens, hidden_size = x_TM.shape
    places = pairs.places_P
    out = x_TM.new_empty((len(places), hidden_size))
    columns = min(1024, next_power_of_2(hidden_size))
    rows_in_order_kernel[(num_tokens, cdiv(hidden_size, columns))](
        x_TM,
        places,
        out,
        hidden_size,
        TOP_K=len(places) // num_tokens,
        BLOCK_N=columns,
        **launch_options(x_TM.device),
    )
    return out


def many_gate_up(
    rows_RM: Tensor,
    pairs: SortedPairs,
    experts: StackedExperts,
    activation: Activation,
    out_RF: Tensor,
    first_expert: int = 0,
) -> None:
    """Writes hidden [R, F] of the rows that go to `experts`, those from `first_expert` on."""
    biases = experts.biases
    _launch(
        *(rows_RM, experts.gate_EFM, experts.up_EFM, out_RF, pairs, first_expert),
        biases=None if biases is None else (biases.gate_EF, biases.up_EF),
        activation=activation,
    )


def many_down(
    hidden_RF: Tensor, topk_weights: Tensor, pairs: SortedPairs, down_EMF: Tensor
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers."""
    parts = hidden_RF.new_empty((len(hidden_RF), down_EMF.shape[1]))
    _launch(hidden_RF, down_EMF, down_EMF, parts, pairs, 0, weights_P=topk_weights)
    return parts


def _launch(
    x: Tensor,
    first_ENK: Tensor,
    second_ENK: Tensor,
    out: Tensor,
    pairs: SortedPairs,
    first_expert: int,
    *,
    biases: tuple[Tensor, Tensor] | None = None,
    activation: Activation = "silu",
    weights_P: Tensor | None = None,
) -> None:
    num_blocks, num_rows, length = pairs.blocks_3B.shape[1], out.shape[1], x.shape[1]
    is_gated = weights_P is None
    columns = num_rows // (TILE.value * (1 if is_gated else 2))
    many_kernel[(min(num_blocks * columns, num_processors(out.device)),)](
        _boxes(x, HALF.value),
        _boxes(first_ENK.view(-1, length), TILE.value),
        _boxes(second_ENK.view(-1, length), TILE.value),
        *((x, x) if biases is None else biases),
        out,
        x if weights_P is None else weights_P,
        pairs.order_P,
        pairs.blocks_3B,
        num_blocks,
        first_expert,
        len(first_ENK),
        num_rows,
        length // COLUMNS.value,
        columns,
        STAGES=STAGES,
        IS_GATED=is_gated,
        HAS_BIAS=biases is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=TL_DTYPES[x.dtype],
        REGISTERS=BRINGER_REGISTERS,
        num_warps=4,
        **launch_options(out.device),
    )


def _boxes(matrix: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, COLUMNS.value], _BOX_LAYOUT)
