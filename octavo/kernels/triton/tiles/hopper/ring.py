"""Packed weights in the sums of products on Hopper: codes come long before they are multiplied.

Called by the kernels of few tokens. Codes, scales and x go through rings of tiles in shared memory,
so that what is on its way does not take registers, and from there to the threads that multiply
them (`ring_numbers.py`).

`takes` says of which weights this knows. `tiles/packed.py` has all of them, for other GPUs and for
sums whose order is fixed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_wait

from octavo.kernels.planes import Planes
from octavo.kernels.triton.tiles.codes import high_of, parts_of
from octavo.kernels.triton.tiles.hopper.ring_numbers import (
    COLUMNS,
    add_tile,
    factors_of_tile,
    groups_in_tile,
    high_tiles,
    sums_layout,
)
from octavo.kernels.triton.tiles.packed import RUN
from octavo.kernels.triton.tiles.scales import factor_of, group_of, has_offsets
from octavo.planes import PlaneLayout

HALF = gl.constexpr(64)
"""Columns that a row has a whole number of times."""
LONG = frozenset({"q2_k", "q3_k", "iq4_xs", "nvfp4"})
"""Layouts whose numbers take more instructions than there is time for while memory brings them."""


def takes(layout: PlaneLayout, cols: int) -> bool:
    """Whether `ring_sums` multiplies with rows of `cols` columns in a layout."""
    is_whole = cols % HALF.value == 0 and layout.padded(cols) == cols
    return is_whole and layout.group in (16, 32, 64, 128) and layout.name not in LONG


def is_aligned(planes: Planes) -> bool:
    """Whether copies of 16 bytes can begin at every 16th row of a weight."""
    starts = all(plane.data_ptr() % 16 == 0 for plane in planes)
    return starts and planes.scales.stride(1) % 16 == 0


@gluon.constexpr_function
def _x_layout(is_wide: bool) -> gl.NVMMASharedLayout | gl.SwizzledSharedLayout:
    """Of tiles of x [tokens, COLUMNS]."""
    return gl.NVMMASharedLayout(128, 16, 2) if is_wide else gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.constexpr_function
def _words_layout(words: int) -> gl.SwizzledSharedLayout:
    """Of tiles of words [rows, words], without bank conflicts: rows of 32, 64 or 128 bytes."""
    rows = 64 // words
    return gl.SwizzledSharedLayout(8, rows, 8 // rows, [1, 0])


@gluon.constexpr_function
def _copies_layout(columns: int, warps: int, at_once: int = 8) -> gl.BlockedLayout:
    """Of tiles that are copied `at_once` neighbours at a time, whole rows side by side."""
    along = min(32, columns // at_once)
    return gl.BlockedLayout([1, at_once], [32 // along, along], [warps, 1], [1, 0])


@gluon.constexpr_function
def x_rows_layout(warps: int) -> gl.SliceLayout:
    """Of the rows of x that `ring_sums` takes."""
    return gl.SliceLayout(1, _copies_layout(COLUMNS.value, warps))


@gluon.constexpr_function
def _plane_layout(rows: int, dtype: gl.dtype, warps: int) -> gl.BlockedLayout:
    """Of what is copied of scales and their like: never more than eight rows at once, as pairs of
    matrices take turns."""
    return _copies_layout(rows, warps, min(8, 128 // dtype.primitive_bitwidth))


@gluon.jit
def _rows_at(first, second, first_row, stride, ROWS: gl.constexpr, PAIRED: gl.constexpr,
             layout: gl.constexpr):  # fmt: skip
    """Returns where the rows of a tile begin in planes of one matrix, or PAIRED of two, in turns of
    eight rows: what a thread has sums of."""
    row = gl.arange(0, ROWS, layout)
    if PAIRED:
        at = (first_row + (row // 16 * 8 + row % 8)).to(gl.int64) * stride
        return gl.where(row // 8 % 2 == 1, second + at, first + at)
    else:
        return first + (first_row + row).to(gl.int64) * stride


@gluon.jit
def _words_at(planes, PLANE: gl.constexpr, first_row, num_words, ROWS: gl.constexpr,
              PAIRED: gl.constexpr, WORDS: gl.constexpr):  # fmt: skip
    """Returns where the first WORDS words of each row lie [ROWS, WORDS]; rows have num_words."""
    layout: gl.constexpr = _copies_layout(WORDS, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    first, second = planes
    at = _rows_at(first[PLANE], second[PLANE], first_row, num_words, ROWS, PAIRED, rows)
    return at[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _plane_at(planes, PLANE: gl.constexpr, first_row, ROWS: gl.constexpr, PAIRED: gl.constexpr):
    """Returns where the rows' first scales lie, or their like [1, ROWS]."""
    dtype: gl.constexpr = planes[0][PLANE].dtype.element_ty
    layout: gl.constexpr = _plane_layout(ROWS, dtype, gl.num_warps())
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    first, second = planes
    return _rows_at(first[PLANE], second[PLANE], first_row, 1, ROWS, PAIRED, columns)[None, :]


@gluon.jit
def _bring_plane(at, to, first, COUNT: gl.constexpr, stride, length, is_some,
                 EVEN_K: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Copies COUNT columns of scales or their like, which are `stride` apart, `first` on; of groups
    that rows of `length` have, unless EVEN_K."""
    layout: gl.constexpr = _plane_layout(to.shape[1], to.dtype, gl.num_warps())
    column = first + gl.arange(0, COUNT, gl.SliceLayout(1, layout))[:, None]
    is_in = is_some if EVEN_K else is_some & (column < length // group_of(FORMAT))
    async_copy.async_copy_global_to_shared(to, at + column.to(gl.int64) * stride, mask=is_in)


@gluon.jit
def _bring_weight(sources, rings, step, begin, end, stride, length, STAGES: gl.constexpr,
                  TILES: gl.constexpr, EVEN_K: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Copies what a step needs of the weight, where there is any."""
    WORDS: gl.constexpr = COLUMNS // parts_of(FORMAT)
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    FACTORS: gl.constexpr = factors_of_tile(FORMAT)
    copies: gl.constexpr = _copies_layout(WORDS, gl.num_warps())
    word = gl.arange(0, WORDS, gl.SliceLayout(0, copies))[None, :]
    for i in gl.static_range(TILES):
        tile, slot = begin + step * TILES + i, step % STAGES * TILES + i
        is_some = tile < end
        is_in = is_some
        if not EVEN_K:
            is_in = is_some & (word < length // HALF * (WORDS // 2) - tile * WORDS)
        to = rings[0].index(slot)
        async_copy.async_copy_global_to_shared(to, sources[0] + tile * WORDS, mask=is_in)
        if high_of(FORMAT) > 0:
            at = sources[1] + tile // high_tiles(FORMAT) * RUN
            async_copy.async_copy_global_to_shared(rings[1].index(slot), at, mask=is_some)
        _bring_plane(
            *(sources[2], rings[2].index(slot), tile * GROUPS, GROUPS, stride, length, is_some),
            *(EVEN_K, FORMAT),
        )
        if has_offsets(FORMAT):
            _bring_plane(
                *(sources[3], rings[3].index(slot), tile * GROUPS, GROUPS, stride, length, is_some),
                *(EVEN_K, FORMAT),
            )
        if FACTORS > 0:
            first = tile // 2 * FACTORS
            _bring_plane(
                *(sources[4], rings[4].index(slot), first, FACTORS, stride, length, is_some),
                *(True, FORMAT),
            )


@gluon.jit
def _bring_x(at, is_row, ring, step, begin, end, length, STAGES: gl.constexpr,
             TILES: gl.constexpr, EVEN_K: gl.constexpr):  # fmt: skip
    """Copies a step's numbers of x, where there are any: others are 0."""
    copies: gl.constexpr = _copies_layout(COLUMNS, gl.num_warps())
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, copies))[None, :]
    for i in gl.static_range(TILES):
        tile = begin + step * TILES + i
        is_in = is_row & (tile < end)
        if not EVEN_K:
            is_in = is_in & (column < length // HALF * HALF - tile * COLUMNS)
        to = ring.index(step % STAGES * TILES + i)
        async_copy.async_copy_global_to_shared(to, at + tile * COLUMNS, mask=is_in)


@gluon.jit
def _plane_ring(planes, PLANE: gl.constexpr, COUNT: gl.constexpr, SLOTS: gl.constexpr,
                ROWS: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    dtype: gl.constexpr = planes[0][PLANE].dtype.element_ty
    return gl.allocate_shared_memory(dtype, [SLOTS, COUNT, ROWS], layout)


@gluon.jit
def _sources_and_rings(
    planes, first_row, length, SLOTS: gl.constexpr, ROWS: gl.constexpr, PAIRED: gl.constexpr,
    FORMAT: gl.constexpr,
):  # fmt: skip
    """Returns where the planes' rows begin, and rings for tiles of them; what there is none of is
    that of the plane before it."""
    WORDS: gl.constexpr = COLUMNS // parts_of(FORMAT)
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    FACTORS: gl.constexpr = factors_of_tile(FORMAT)
    # As many words as columns tell, whose alignment is known.
    num_words = length // HALF * (WORDS // 2)
    words_at = _words_at(planes, 0, first_row, num_words, ROWS, PAIRED, WORDS)
    words = gl.allocate_shared_memory(gl.int16, [SLOTS, ROWS, WORDS], _words_layout(WORDS))
    high_at, high = words_at, words
    if high_of(FORMAT) > 0:
        of_row = length // (COLUMNS * high_tiles(FORMAT)) * RUN
        high_at = _words_at(planes, 3, first_row, of_row, ROWS, PAIRED, RUN)
        high = gl.allocate_shared_memory(gl.int16, [SLOTS, ROWS, RUN], _words_layout(RUN))
    scales_at = _plane_at(planes, 1, first_row, ROWS, PAIRED)
    scales = _plane_ring(planes, 1, GROUPS, SLOTS, ROWS)
    offsets_at, offsets = scales_at, scales
    if has_offsets(FORMAT):
        offsets_at = _plane_at(planes, 2, first_row, ROWS, PAIRED)
        offsets = _plane_ring(planes, 2, GROUPS, SLOTS, ROWS)
    factors_at, factors = scales_at, scales
    if FACTORS > 0:
        factors_at = _plane_at(planes, 4, first_row, ROWS, PAIRED)
        factors = _plane_ring(planes, 4, FACTORS, SLOTS, ROWS)
    sources = words_at, high_at, scales_at, offsets_at, factors_at
    return sources, (words, high, scales, offsets, factors)


@gluon.jit
def ring_sums(
    x, x_row, is_row, planes, first_row, length, begin, end,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    WIDE: gl.constexpr, EVEN_K: gl.constexpr, PAIRED: gl.constexpr, COMPUTE: gl.constexpr,
    FORMAT: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Returns weight @ x.T [ROWS, TOKENS] over tiles `begin` to `end` of COLUMNS columns.

    x: numbers of COMPUTE, rows of `length`; x_row, is_row [TOKENS]: which rows, in layout
    `x_rows_layout`, and whether there is one, else sums are 0. planes: two weights, of which ROWS
    rows count from first_row on: all of the first, or PAIRED, half of them from each, in turns of
    eight. A step has TILES tiles, and rings have room for STAGES steps. WIDE: as in `sums_layout`.
    EVEN_K: a row has whole tiles, else its last may be half of one. OVERLAP: the turn of the kernel
    has not come yet, as x_row does not depend on it.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = STAGES * TILES
    sums: gl.constexpr = sums_layout(TOKENS, WIDE, WARPS)
    x_copies: gl.constexpr = _copies_layout(COLUMNS, WARPS)
    sources, rings = _sources_and_rings(planes, first_row, length, SLOTS, ROWS, PAIRED, FORMAT)
    stride = planes[0][5]
    x_tiles = gl.allocate_shared_memory(COMPUTE, [SLOTS, TOKENS, COLUMNS], _x_layout(WIDE))
    x_at = x + x_row.to(gl.int64)[:, None] * (length // HALF * HALF)
    x_at = x_at + gl.arange(0, COLUMNS, gl.SliceLayout(0, x_copies))[None, :]
    is_row = is_row[:, None]
    if OVERLAP:
        for step in range(STAGES - 1):
            _bring_weight(
                *(sources, rings, step, begin, end, stride, length),
                *(STAGES, TILES, EVEN_K, FORMAT),
            )
    if OVERLAP:
        gdc_wait()
    for step in range(STAGES - 1):
        if not OVERLAP:
            _bring_weight(
                *(sources, rings, step, begin, end, stride, length),
                *(STAGES, TILES, EVEN_K, FORMAT),
            )
        _bring_x(x_at, is_row, x_tiles, step, begin, end, length, STAGES, TILES, EVEN_K)
        async_copy.commit_group()
    total = gl.zeros([ROWS, TOKENS], gl.float32, sums)
    for step in range((end - begin + TILES - 1) // TILES):
        async_copy.wait_group(STAGES - 2)
        if WIDE:
            fence_async_shared()
            gl.thread_barrier()
        ahead = step + STAGES - 1
        _bring_weight(
            *(sources, rings, ahead, begin, end, stride, length), *(STAGES, TILES, EVEN_K, FORMAT)
        )
        _bring_x(x_at, is_row, x_tiles, ahead, begin, end, length, STAGES, TILES, EVEN_K)
        async_copy.commit_group()
        for i in range(TILES):
            at = step % STAGES * TILES + i
            words, high = rings[0].index(at), rings[1].index(at)
            planes_of = rings[2].index(at), rings[3].index(at), rings[4].index(at)
            tile = words, high, planes_of, x_tiles.index(at)
            total = add_tile(total, tile, begin + step * TILES + i, WIDE, COMPUTE, FORMAT)
    async_copy.wait_group(0)
    if factor_of(FORMAT) == "row":
        of_sums: gl.constexpr = gl.SliceLayout(1, sums)
        first, second = planes
        total *= gl.load(_rows_at(first[4], second[4], first_row, 1, ROWS, PAIRED, of_sums))[
            :, None
        ]
    return total
