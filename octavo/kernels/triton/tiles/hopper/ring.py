"""Packed weights in the sums of products on Hopper: codes come long before they are multiplied.

Called by the kernels of some tokens. Codes and x go through rings of tiles in shared memory, so
that what is on its way does not take registers, and from there to the threads that multiply them:
rows of the weight are the rows of a product, its columns the tokens, so that codes become floats
where the tensor cores want them. Scales meet what was summed within a group; a zero is taken off
before, which is exact.

`takes` says of which weights this knows. `tiles/packed.py` has all of them, for other GPUs and for
sums whose order is fixed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.triton.tiles.codes import bias_of, parts_of, raw_parts
from octavo.kernels.triton.tiles.packed import RUN
from octavo.kernels.triton.tiles.scales import centre_of, offset_of, scale_number
from octavo.planes import PLANE_LAYOUTS, PlaneLayout

COLUMNS = gl.constexpr(128)
"""Of a tile: a row has a whole number of them."""
_LESS = gl.constexpr("sub.rn.bf16x2 $0, $1, $2;")
_LESS_HALF = gl.constexpr("sub.rn.f16x2 $0, $1, $2;")


def takes(layout: PlaneLayout, cols: int) -> bool:
    """Whether `ring_sums` multiplies with rows of `cols` columns in a layout."""
    is_known = layout.factor == "none" and layout.offset != "min" and not layout.high
    return is_known and layout.group in (16, 32, 64, 128) and cols % COLUMNS.value == 0


@gluon.constexpr_function
def sums_layout(tokens: int, is_wide: bool, warps: int) -> gl.NVMMADistributedLayout:
    """Of sums [rows, tokens]. IS_WIDE: four warps multiply together, with x from shared memory."""
    if is_wide:
        return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16])
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def _x_layout(is_wide: bool) -> gl.NVMMASharedLayout | gl.SwizzledSharedLayout:
    """Of tiles of x [tokens, COLUMNS]."""
    return gl.NVMMASharedLayout(128, 16, 2) if is_wide else gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.constexpr_function
def _words_layout(words: int) -> gl.SwizzledSharedLayout:
    """Of tiles of codes [rows, words], without bank conflicts: rows of 64 bytes or of 128."""
    rows = 64 // words
    return gl.SwizzledSharedLayout(8, rows, 8 // rows, [1, 0])


@gluon.constexpr_function
def _copies_layout(columns: int, warps: int) -> gl.BlockedLayout:
    """Of tiles that are copied 16 bytes at a time, whole rows side by side."""
    along = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // along, along], [warps, 1], [1, 0])


@gluon.constexpr_function
def x_rows_layout(warps: int) -> gl.SliceLayout:
    """Of the rows of x that `ring_sums` takes."""
    return gl.SliceLayout(1, _copies_layout(COLUMNS.value, warps))


@gluon.constexpr_function
def _is_code(format: str) -> bool:
    """Whether numbers are codes less a zero."""
    return PLANE_LAYOUTS[format].values == "uint"


@gluon.constexpr_function
def _groups_in_tile(format: str) -> int:
    return COLUMNS.value // PLANE_LAYOUTS[format].group


@gluon.jit
def _places(ROWS: gl.constexpr, PAIRED: gl.constexpr, layout: gl.constexpr):
    """Returns which row of its matrix each row of a tile is, and whether its matrix is the second.
    Pairs of rows are eight apart: what a thread has sums of."""
    row = gl.arange(0, ROWS, layout)
    if PAIRED:
        return row // 16 * 8 + row % 8, row // 8 % 2 == 1
    else:
        return row, row < 0


@gluon.jit
def _rows_at(first, second, first_row, stride, ROWS: gl.constexpr, PAIRED: gl.constexpr,
             layout: gl.constexpr):  # fmt: skip
    """Returns where the rows of a tile begin in planes of one matrix or of two."""
    place, is_second = _places(ROWS, PAIRED, layout)
    at = (first_row + place).to(gl.int64) * stride
    return gl.where(is_second, second + at, first + at) if PAIRED else first + at


@gluon.jit
def _bring(source, rings, step, begin, end, STAGES: gl.constexpr, TILES: gl.constexpr,
           IS_X: gl.constexpr):  # fmt: skip
    """Copies the codes of a step, or its numbers of x (IS_X), where there are any."""
    at, is_some = source
    for i in gl.static_range(TILES):
        tile = begin + step * TILES + i
        to = rings.index(step % STAGES * TILES + i)
        mask = is_some & (tile < end) if IS_X else tile < end
        async_copy.async_copy_global_to_shared(to, at + tile * to.shape[1], mask=mask)


@gluon.jit
def _load_scales(planes_at, stride, tile, end, FORMAT: gl.constexpr):
    """Returns the raw scales, and after them zeros, of the groups of a tile."""
    GROUPS: gl.constexpr = _groups_in_tile(FORMAT)
    scales_at, zeros_at = planes_at
    first = gl.minimum(tile, end - 1).to(gl.int64) * (GROUPS * stride)
    raw = ()
    for group in gl.static_range(GROUPS):
        raw = raw + (gl.load(scales_at + (first + group * stride)),)
    if offset_of(FORMAT) == "zero":
        for group in gl.static_range(GROUPS):
            raw = raw + (gl.load(zeros_at + (first + group * stride)),)
    return raw


@gluon.jit
def _numbers(words, COMPUTE: gl.constexpr, FORMAT: gl.constexpr):
    """Returns the numbers [M, COLUMNS] of words [M, ..], larger by `bias_of`."""
    M: gl.constexpr = words.shape[0]
    RUNS: gl.constexpr = words.shape[1] // RUN
    parts = raw_parts(words, words, 0, COMPUTE, FORMAT)
    if parts_of(FORMAT) == 2:
        both = gl.join(parts[0], parts[1]).reshape([M, RUNS, RUN, 2])
        numbers = both.permute((0, 1, 3, 2))
    else:
        all = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
        numbers = all.reshape([M, RUNS, RUN, 2, 2]).permute((0, 1, 3, 4, 2))
    return numbers.reshape([M, COLUMNS])


@gluon.constexpr_function
def _log2(count: int) -> int:
    return count.bit_length() - 1


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
def _by_groups(x, axis: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """Returns x in COUNT parts along an axis, in `layout`."""
    parts = (x,)
    for _ in gl.static_range(_log2(COUNT)):
        halves = ()
        for part in gl.static_range(len(parts)):
            halves = halves + _halves(parts[part], axis)
        parts = halves
    placed = ()
    for part in gl.static_range(COUNT):
        placed = placed + (gl.convert_layout(parts[part], layout, assert_trivial=True),)
    return placed


@gluon.jit
def _less_zero(numbers, raw, GROUP: gl.constexpr, rows: gl.constexpr, COMPUTE: gl.constexpr,
               FORMAT: gl.constexpr):  # fmt: skip
    """Returns the numbers of a group without what all its codes have in common."""
    if not _is_code(FORMAT):
        return numbers
    BIAS: gl.constexpr = bias_of(COMPUTE, FORMAT)
    if offset_of(FORMAT) == "zero":
        zero = (raw[_groups_in_tile(FORMAT) + GROUP].to(gl.float32) + BIAS).to(COMPUTE)
        zero = zero[:, None].broadcast_to(numbers.shape)
    else:
        zero = gl.full(numbers.shape, BIAS + centre_of(FORMAT), COMPUTE, rows)
    return gl.inline_asm_elementwise(
        _LESS if numbers.dtype == gl.bfloat16 else _LESS_HALF,
        "=r,r,r", [numbers, zero], dtype=numbers.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _codes_at(planes, first_row, num_words, ROWS: gl.constexpr, PAIRED: gl.constexpr,
              layout: gl.constexpr, WORDS: gl.constexpr):  # fmt: skip
    """Returns where the first tile's words lie [ROWS, WORDS]; rows have num_words."""
    first, second = planes
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    at = _rows_at(first[0], second[0], first_row, num_words, ROWS, PAIRED, rows)
    return at[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _scales_at(planes, first_row, ROWS: gl.constexpr, PAIRED: gl.constexpr, sums: gl.constexpr,
               rows: gl.constexpr):  # fmt: skip
    """Returns where the rows' first scales and zeros lie, for those who scale and who take off."""
    first, second = planes
    of_sums: gl.constexpr = gl.SliceLayout(1, sums)
    of_rows: gl.constexpr = gl.SliceLayout(1, rows)
    scales = _rows_at(first[1], second[1], first_row, 1, ROWS, PAIRED, of_sums)
    return scales, _rows_at(first[2], second[2], first_row, 1, ROWS, PAIRED, of_rows)


@gluon.jit
def _add_tile(total, words, x_tile, raw, WIDE: gl.constexpr, COMPUTE: gl.constexpr,
              FORMAT: gl.constexpr):  # fmt: skip
    """Returns total with the products of a tile: words in registers, x_tile [COLUMNS, TOKENS] in
    shared memory."""
    sums: gl.constexpr = total.type.layout
    rows: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    columns: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    GROUPS: gl.constexpr = _groups_in_tile(FORMAT)
    numbers = _by_groups(_numbers(words, COMPUTE, FORMAT), 1, GROUPS, rows)
    if not WIDE:
        x_parts = _by_groups(x_tile.load(columns), 0, GROUPS, columns)
    zeros = gl.zeros_like(total)
    for group in gl.static_range(GROUPS):
        of_group = _less_zero(numbers[group], raw, group, rows, COMPUTE, FORMAT)
        if WIDE:
            gl.static_assert(GROUPS == 1)
            part = warpgroup_mma(of_group, x_tile, zeros, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, [part])
        else:
            part = mma_v2(of_group, x_parts[group], zeros)
        total += part * scale_number(raw[group], FORMAT)[:, None]
    return total


@gluon.jit
def ring_sums(
    x, x_row, is_row, planes, first_row, length, begin, end,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    WIDE: gl.constexpr, PAIRED: gl.constexpr, COMPUTE: gl.constexpr, FORMAT: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """Returns weight @ x.T [ROWS, TOKENS] over tiles `begin` to `end` of COLUMNS columns.

    x: numbers of COMPUTE, rows of `length`; x_row, is_row [TOKENS]: which rows, in layout
    `x_rows_layout`, and whether there is one, else sums are 0. planes: two weights, of which ROWS
    rows count from first_row on: all of the first, or PAIRED, half of them from each, in turns of
    eight. A step has TILES tiles, and rings have room for STAGES steps. WIDE: as in `sums_layout`.
    OVERLAP: the turn of the kernel has not come yet, as x_row does not depend on it.
    """
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = COLUMNS // parts_of(FORMAT)
    sums: gl.constexpr = sums_layout(TOKENS, WIDE, WARPS)
    rows: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    x_copies: gl.constexpr = _copies_layout(COLUMNS, WARPS)
    codes = gl.allocate_shared_memory(gl.int16, [STAGES * TILES, ROWS, WORDS], _words_layout(WORDS))
    x_tiles = gl.allocate_shared_memory(COMPUTE, [STAGES * TILES, TOKENS, COLUMNS], _x_layout(WIDE))
    num_words = length // COLUMNS * WORDS
    copies: gl.constexpr = _copies_layout(WORDS, WARPS)
    codes_at = _codes_at(planes, first_row, num_words, ROWS, PAIRED, copies, WORDS), True
    # As many numbers as words tell, whose alignment is known.
    x_at = x + x_row.to(gl.int64)[:, None] * (length // COLUMNS * COLUMNS)
    x_at = x_at + gl.arange(0, COLUMNS, gl.SliceLayout(0, x_copies))[None, :], is_row[:, None]
    for step in gl.static_range(STAGES - 1):
        _bring(codes_at, codes, step, begin, end, STAGES, TILES, False)
    if OVERLAP:
        gdc_wait()
    for step in gl.static_range(STAGES - 1):
        _bring(x_at, x_tiles, step, begin, end, STAGES, TILES, True)
        async_copy.commit_group()
    planes_at, stride = _scales_at(planes, first_row, ROWS, PAIRED, sums, rows), planes[0][5]
    raw = _load_scales(planes_at, stride, begin, end, FORMAT)
    total = gl.zeros([ROWS, TOKENS], gl.float32, sums)
    for step in range((end - begin + TILES - 1) // TILES):
        async_copy.wait_group(STAGES - 2)
        if WIDE:
            fence_async_shared()
            gl.thread_barrier()
        _bring(codes_at, codes, step + STAGES - 1, begin, end, STAGES, TILES, False)
        _bring(x_at, x_tiles, step + STAGES - 1, begin, end, STAGES, TILES, True)
        async_copy.commit_group()
        for i in range(TILES):
            following = _load_scales(planes_at, stride, begin + step * TILES + i + 1, end, FORMAT)
            at = step % STAGES * TILES + i
            words, x_tile = codes.index(at).load(rows), x_tiles.index(at).permute((1, 0))
            total = _add_tile(total, words, x_tile, raw, WIDE, COMPUTE, FORMAT)
            raw = following
    async_copy.wait_group(0)
    return total
