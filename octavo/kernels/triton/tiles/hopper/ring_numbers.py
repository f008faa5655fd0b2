"""What a tile of a packed weight is multiplied as on Hopper: numbers, scales and minima by groups.

Called by `ring.py`, which brings tiles. Rows of the weight are the rows of a product, so that codes
become floats where the tensor cores want them. Scales meet what was summed within a group. What all
codes of a group have in common is taken off before, where it is a number that floats tell exactly;
minima are multiplied by the sums of x over a group, which a product with ones makes where they are
wanted.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.triton.tiles.codes import bias_of, high_of, parts_of, raw_parts, small_power
from octavo.kernels.triton.tiles.packed import RUN, runs_of
from octavo.kernels.triton.tiles.scales import (
    group_of,
    has_offsets,
    has_shift,
    num_factors,
    offset_of,
    scale_zero_minimum,
)
from octavo.planes import BLOCK, PLANE_LAYOUTS

COLUMNS = gl.constexpr(128)
"""Of a tile."""
LONE_GROUPS = gl.constexpr(8)
"""Columns of a product with one row of x alone, whose groups they are."""
NARROW = 32
"""Columns of a group at most, where products with one row are such: wider ones are so few that it
does not pay."""
_LESS = gl.constexpr("sub.rn.bf16x2 $0, $1, $2;")
_LESS_HALF = gl.constexpr("sub.rn.f16x2 $0, $1, $2;")
_LARGER = gl.constexpr("{\n.reg .b32 g;\nmov.b32 g, 0x5f805f80;\nmul.rn.bf16x2 $0, $1, g;\n}")
LARGER_POWER = gl.constexpr(64)
"""By which power of two x is multiplied that meets numbers that are too small: not more, so that
nothing that a layer can have overflows, and not less, so that sums stay normal numbers."""
_SHIFTED = gl.constexpr("shr.b32 $0, $1, 8;")


@gluon.constexpr_function
def sums_layout(tokens: int, is_wide: bool, warps: int) -> gl.NVMMADistributedLayout:
    """Of sums [rows, tokens]. IS_WIDE: four warps multiply together, with x from shared memory."""
    if is_wide:
        return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16])
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def groups_in_tile(format: str) -> int:
    return COLUMNS.value // PLANE_LAYOUTS[format].group


@gluon.constexpr_function
def factors_of_tile(format: str) -> int:
    """Returns the factors that a tile's scales and minima have, which its block's others share."""
    return num_factors(BLOCK, format)


@gluon.constexpr_function
def is_by_columns(format: str, is_lone: bool) -> bool:
    """Whether the columns of a product are the groups of one row of x."""
    return is_lone and PLANE_LAYOUTS[format].group <= NARROW


@gluon.constexpr_function
def span_of(format: str, tiles: int, is_lone: bool) -> int:
    """Returns how many tiles, of a step of so many, meet their scales at once."""
    if not is_by_columns(format, is_lone):
        return 1
    return max(1, min(tiles, LONE_GROUPS.value * PLANE_LAYOUTS[format].group // COLUMNS.value))


@gluon.constexpr_function
def high_tiles(format: str) -> int:
    """Returns how many tiles share a run of words of high bits."""
    return max(1, RUN.value * parts_of(format) * runs_of(format) // COLUMNS.value)


@gluon.constexpr_function
def _is_code(format: str) -> bool:
    """Whether numbers are codes less a zero."""
    return PLANE_LAYOUTS[format].values == "uint"


@gluon.constexpr_function
def _log2(count: int) -> int:
    return count.bit_length() - 1


@gluon.constexpr_function
def scales_layout(rows: int, columns: int, warps: int) -> gl.DistributedLinearLayout:
    """Of scales [rows, columns]: each thread has those of the rows that it has sums of."""
    along = [[0, 1 << bit] for bit in range(_log2(columns))]
    tiles = [[16 * warps << bit, 0] for bit in range(_log2(rows // (16 * warps)))]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    of_warps = [[16 << bit, 0] for bit in range(_log2(warps))]
    return gl.DistributedLinearLayout(
        [*along, [8, 0], *tiles], lanes, of_warps, [], [rows, columns]
    )


@gluon.jit
def _halves(x, axis: gl.constexpr):
    """Returns the halves of x along its columns (1), or rows (0)."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    if axis == 1:
        return gl.split(x.reshape([M, 2, N // 2]).permute((0, 2, 1)))
    else:
        return gl.split(x.reshape([2, M // 2, N]).permute((1, 2, 0)))


@gluon.jit
def _in_parts(x, axis: gl.constexpr, COUNT: gl.constexpr):
    """Returns x in COUNT parts along an axis."""
    parts = (x,)
    for _ in gl.static_range(_log2(COUNT)):
        halves = ()
        for part in gl.static_range(len(parts)):
            halves = halves + _halves(parts[part], axis)
        parts = halves
    return parts


@gluon.jit
def _by_groups(x, axis: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """Returns x in COUNT parts along an axis, in `layout`."""
    parts = _in_parts(x, axis, COUNT)
    placed = ()
    for part in gl.static_range(COUNT):
        placed = placed + (gl.convert_layout(parts[part], layout, assert_trivial=True),)
    return placed


@gluon.jit
def _rows_of(plane, COUNT: gl.constexpr, sums: gl.constexpr):
    """Returns the COUNT numbers of each row that a plane's tile [COUNT, ROWS] has."""
    ROWS: gl.constexpr = plane.shape[1]
    layout: gl.constexpr = scales_layout(ROWS, COUNT, gl.num_warps())
    parts = _in_parts(plane.permute((1, 0)).load(layout), 1, COUNT)
    placed = ()
    for part in gl.static_range(COUNT):
        row = parts[part].reshape([ROWS])
        placed = placed + (gl.convert_layout(row, gl.SliceLayout(1, sums), assert_trivial=True),)
    return placed


@gluon.jit
def _scales_of(planes, sums: gl.constexpr, FORMAT: gl.constexpr):
    """Returns the scales and offsets of a tile's groups, and the factors of them all, as
    `scale_zero_minimum` takes them."""
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    scales = _rows_of(planes[0], GROUPS, sums)
    raw = ()
    if has_offsets(FORMAT):
        offsets = _rows_of(planes[1], GROUPS, sums)
        for group in gl.static_range(GROUPS):
            raw = raw + (scales[group], offsets[group])
    else:
        raw = scales
    if factors_of_tile(FORMAT) > 0:
        raw = raw + _rows_of(planes[2], factors_of_tile(FORMAT), sums)
    return raw


@gluon.jit
def _four(a, b, c, d):
    """Returns [.., 2, 2]: b is that of the last dimension's first, a and c of its second."""
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.constexpr_function
def lost_power(compute: gl.dtype, format: str) -> float:
    """Returns what sums are to be multiplied with in the end where numbers stay too small by the
    `small_power` (IS_SMALL), and x is made larger."""
    return 2.0 ** (small_power(compute, format) - LARGER_POWER.value)


@gluon.jit
def _x_of(x, IS_SMALL: gl.constexpr):
    """Returns numbers of x as they meet those of the weight."""
    if IS_SMALL:
        x = gl.inline_asm_elementwise(_LARGER, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    return x


@gluon.jit
def _numbers(words, high, SUB: gl.constexpr, IS_SMALL: gl.constexpr, COMPUTE: gl.constexpr,
             FORMAT: gl.constexpr):  # fmt: skip
    """Returns the numbers [M, columns] of words [M, ..], larger by `bias_of`. `high`: the words of
    their high bits, of which theirs are the part SUB."""
    M: gl.constexpr = words.shape[0]
    RUNS: gl.constexpr = words.shape[1] // RUN
    parts = raw_parts(words, high, SUB, COMPUTE, FORMAT, IS_SMALL)
    if parts_of(FORMAT) == 2:
        both = gl.join(parts[0], parts[1]).reshape([M, RUNS, RUN, 2])
        numbers = both.permute((0, 1, 3, 2))
    elif parts_of(FORMAT) == 4:
        all = _four(parts[0], parts[1], parts[2], parts[3])
        numbers = all.reshape([M, RUNS, RUN, 2, 2]).permute((0, 1, 3, 4, 2))
    else:
        even = _four(parts[0], parts[2], parts[4], parts[6])
        odd = _four(parts[1], parts[3], parts[5], parts[7])
        all = gl.join(even, odd).reshape([M, RUNS, RUN, 2, 2, 2])
        numbers = all.permute((0, 1, 3, 4, 5, 2))
    return numbers.reshape([M, words.shape[1] * parts_of(FORMAT)])


@gluon.jit
def _shifted(high, is_second, FORMAT: gl.constexpr):
    """Returns the words of high bits with those of this tile, if it is the second of two that share
    them, moved down. What else was in a word or its neighbour is left above them."""
    moved = gl.inline_asm_elementwise(
        _SHIFTED, "=r,r", [high], dtype=high.dtype, is_pure=True, pack=2
    )
    return gl.where(is_second, moved, high)


@gluon.jit
def _numbers_of_tile(
    words, high, number, PARTS: gl.constexpr, rows: gl.constexpr, IS_SMALL: gl.constexpr,
    COMPUTE: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Returns the numbers [ROWS, ..] of a tile, the `number`-th of its row, in so many parts."""
    words = words.load(rows)
    if high_of(FORMAT) == 0:
        made = _numbers(words, words, 0, IS_SMALL, COMPUTE, FORMAT)
        return _by_groups(made, 1, PARTS, rows)
    else:
        high = high.load(rows)
        if high_tiles(FORMAT) == 2:
            high = _shifted(high, number % 2 == 1, FORMAT)
        RUNS: gl.constexpr = words.shape[1] // RUN
        of_runs = _by_groups(words, 1, RUNS, rows)
        groups = ()
        for run in gl.static_range(RUNS):
            numbers = _numbers(of_runs[run], high, run, IS_SMALL, COMPUTE, FORMAT)
            groups = groups + _by_groups(numbers, 1, PARTS // RUNS, rows)
        return groups


@gluon.jit
def _less(numbers, zero, rows: gl.constexpr, COMPUTE: gl.constexpr, FORMAT: gl.constexpr):
    """Returns the numbers of a group without what all its codes have in common."""
    BIAS: gl.constexpr = bias_of(COMPUTE, FORMAT)
    common = zero + BIAS
    if offset_of(FORMAT) == "zero":
        common = gl.convert_layout(common, gl.SliceLayout(1, rows), assert_trivial=True)
        common = common.to(COMPUTE)[:, None].broadcast_to(numbers.shape)
    else:
        common = gl.full(numbers.shape, common, COMPUTE, rows)
    return gl.inline_asm_elementwise(
        _LESS if numbers.dtype == gl.bfloat16 else _LESS_HALF,
        "=r,r,r", [numbers, common], dtype=numbers.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def add_tile(total, tile, number, WIDE: gl.constexpr, IS_SMALL: gl.constexpr,
             COMPUTE: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Returns total with the products of a tile, the `number`-th of its rows (IS_SMALL: over
    `lost_power`): in shared memory its words, those of high bits, (scales, offsets, factors)
    [.., ROWS], and x [TOKENS, COLUMNS]."""
    sums: gl.constexpr = total.type.layout
    rows: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    columns: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    raw = _scales_of(tile[2], sums, FORMAT)
    numbers = _numbers_of_tile(tile[0], tile[1], number, GROUPS, rows, IS_SMALL, COMPUTE, FORMAT)
    x_tile = tile[3].permute((1, 0))
    if not WIDE:
        x_parts = _by_groups(_x_of(x_tile.load(columns), IS_SMALL), 0, GROUPS, columns)
    zeros = gl.zeros_like(total)
    for group in gl.static_range(GROUPS):
        scale, zero, minimum = scale_zero_minimum(raw, group, COLUMNS, FORMAT)
        of_group = numbers[group]
        if _is_code(FORMAT) and offset_of(FORMAT) != "min":
            of_group = _less(of_group, zero, rows, COMPUTE, FORMAT)
        if WIDE:
            gl.static_assert(GROUPS == 1)
            part = warpgroup_mma(of_group, x_tile, zeros, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, [part])
        else:
            part = mma_v2(of_group, x_parts[group], zeros)
        total += part * scale[:, None]
        if offset_of(FORMAT) == "min":
            gl.static_assert(not WIDE)
            ones = gl.full(of_group.shape, 1.0, COMPUTE, rows)
            shift = minimum - bias_of(COMPUTE, FORMAT) * scale
            total += mma_v2(ones, x_parts[group], zeros) * shift[:, None]
    return total


@gluon.constexpr_function
def _lone_parts(format: str) -> int:
    """Returns the parts of a tile that are summed one beside the other, so that no product waits
    for the one before it."""
    is_in_runs = PLANE_LAYOUTS[format].high > 0
    return max(2, COLUMNS.value // parts_of(format) // RUN.value if is_in_runs else 2)


@gluon.jit
def _of_columns(planes, sums: gl.constexpr, FORMAT: gl.constexpr):
    """Returns the scales and offsets [ROWS, LONE_GROUPS] of as many groups, and their factors, as
    `scale_zero_minimum` takes those of one group."""
    raw = (planes[0].permute((1, 0)).load(sums),)
    if has_offsets(FORMAT):
        raw = raw + (planes[1].permute((1, 0)).load(sums),)
    if factors_of_tile(FORMAT) > 0:
        factors = _rows_of(planes[2], factors_of_tile(FORMAT), sums)
        for factor in gl.static_range(factors_of_tile(FORMAT)):
            raw = raw + (factors[factor][:, None],)
    return raw


@gluon.jit
def add_span(total, tiles, number, SPAN: gl.constexpr, IS_SMALL: gl.constexpr,
             COMPUTE: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Returns total [ROWS, LONE_GROUPS] with the products of SPAN tiles, from the `number`-th of
    their rows on, with one row of x, over `lost_power`: each column has those of one group, and is
    to be summed.

    tiles, in shared memory: for each tile words, high bits and x [LONE_GROUPS, COLUMNS], where row
    g has the numbers of group g, else 0; then (scales, offsets, factors) of them all.
    """
    sums: gl.constexpr = total.type.layout
    rows: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    columns: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    PARTS: gl.constexpr = _lone_parts(FORMAT)
    raw = _of_columns(tiles[1], sums, FORMAT)
    scale, zero, minimum = scale_zero_minimum(raw, 0, group_of(FORMAT), FORMAT)
    zeros = gl.zeros_like(total)
    if has_shift(FORMAT):
        shift = minimum - (zero + bias_of(COMPUTE, FORMAT)) * scale
    for i in gl.static_range(SPAN):
        words, high, x = tiles[0][i]
        numbers = _numbers_of_tile(words, high, number + i, PARTS, rows, IS_SMALL, COMPUTE, FORMAT)
        x_tile = _x_of(x.permute((1, 0)).load(columns), IS_SMALL)
        x_parts = _by_groups(x_tile, 0, PARTS, columns)
        for part in gl.static_range(PARTS):
            total += mma_v2(numbers[part], x_parts[part], zeros) * scale
            if has_shift(FORMAT):
                ones = gl.full(numbers[part].shape, 1.0, COMPUTE, rows)
                total += mma_v2(ones, x_parts[part], zeros) * shift
    return total
