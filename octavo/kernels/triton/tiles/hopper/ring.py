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
from octavo.kernels.triton.tiles.codes import high_of, parts_of, small_power
from octavo.kernels.triton.tiles.hopper.ring_numbers import (
    COLUMNS,
    LONE_GROUPS,
    add_span,
    add_tile,
    factors_of_tile,
    groups_in_tile,
    high_tiles,
    is_by_columns,
    lost_power,
    span_of,
    sums_layout,
)
from octavo.kernels.triton.tiles.packed import RUN
from octavo.kernels.triton.tiles.scales import factor_of, group_of, has_offsets
from octavo.planes import PlaneLayout

HALF = gl.constexpr(64)
"""Columns that a row has a whole number of times."""


def takes(layout: PlaneLayout, cols: int) -> bool:
    """Whether `ring_sums` multiplies with rows of `cols` columns in a layout."""
    is_whole = cols % HALF.value == 0 and layout.padded(cols) == cols
    return is_whole and layout.group in (16, 32, 64, 128)


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
def _bring_plane(at, to, first, stride, limit, is_some, MASKED: gl.constexpr):
    """Copies the columns `first` on of scales or their like, which are `stride` apart; MASKED: of
    those below `limit`."""
    layout: gl.constexpr = _plane_layout(to.shape[1], to.dtype, gl.num_warps())
    column = first + gl.arange(0, to.shape[0], gl.SliceLayout(1, layout))[:, None]
    is_in = is_some & (column < limit) if MASKED else is_some
    async_copy.async_copy_global_to_shared(to, at + column.to(gl.int64) * stride, mask=is_in)


@gluon.jit
def _bring_scales(sources, rings, slot, tile, end, stride, length, SPAN: gl.constexpr,
                  EVEN_K: gl.constexpr, LONE: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Copies what SPAN tiles have of scales and their like, from `tile` on, where there are any."""
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    FACTORS: gl.constexpr = factors_of_tile(FORMAT)
    is_some, first = tile < end, tile * GROUPS
    limit = length // group_of(FORMAT)
    if is_by_columns(FORMAT, LONE):
        limit = gl.minimum(limit, gl.minimum(end * GROUPS, first + SPAN * GROUPS))
    MASKED: gl.constexpr = is_by_columns(FORMAT, LONE) or not EVEN_K
    _bring_plane(sources[2], rings[2].index(slot), first, stride, limit, is_some, MASKED)
    if has_offsets(FORMAT):
        _bring_plane(sources[3], rings[3].index(slot), first, stride, limit, is_some, MASKED)
    if FACTORS > 0:
        first = tile // 2 * FACTORS
        _bring_plane(sources[4], rings[4].index(slot), first, stride, limit, is_some, False)


@gluon.jit
def _bring_weight(sources, rings, step, begin, end, stride, length, STAGES: gl.constexpr,
                  TILES: gl.constexpr, EVEN_K: gl.constexpr, LONE: gl.constexpr,
                  FORMAT: gl.constexpr):  # fmt: skip
    """Copies what a step needs of the weight, where there is any."""
    WORDS: gl.constexpr = COLUMNS // parts_of(FORMAT)
    SPAN: gl.constexpr = span_of(FORMAT, TILES, LONE)
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
    for i in gl.static_range(TILES // SPAN):
        slot = step % STAGES * (TILES // SPAN) + i
        _bring_scales(
            *(sources, rings, slot, begin + step * TILES + i * SPAN, end, stride, length),
            *(SPAN, EVEN_K, LONE, FORMAT),
        )


@gluon.jit
def _bring_x(at, is_row, ring, step, begin, end, length, STAGES: gl.constexpr, TILES: gl.constexpr,
             EVEN_K: gl.constexpr, LONE: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Copies a step's numbers of x, where there are any: others are 0. Of a LONE row, if it is by
    columns, to row g those of the g-th group that meets its scale at once with others."""
    copies: gl.constexpr = _copies_layout(COLUMNS, gl.num_warps())
    GROUPS: gl.constexpr = groups_in_tile(FORMAT)
    SPAN: gl.constexpr = span_of(FORMAT, TILES, LONE)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, copies))[None, :]
    row = gl.arange(0, ring.shape[1], gl.SliceLayout(1, copies))[:, None]
    for i in gl.static_range(TILES):
        tile = begin + step * TILES + i
        if is_by_columns(FORMAT, LONE):
            is_row = row == column // group_of(FORMAT) + i % SPAN * GROUPS
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
    planes, first_row, length, SLOTS: gl.constexpr, SPAN: gl.constexpr, ROWS: gl.constexpr,
    PAIRED: gl.constexpr, LONE: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Returns where the planes' rows begin, and rings for tiles of them, scales and their like for
    SPAN at once; what there is none of is that of the plane before it."""
    WORDS: gl.constexpr = COLUMNS // parts_of(FORMAT)
    IS_BY_COLUMNS: gl.constexpr = is_by_columns(FORMAT, LONE)
    GROUPS: gl.constexpr = LONE_GROUPS if IS_BY_COLUMNS else groups_in_tile(FORMAT)
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
    scales = _plane_ring(planes, 1, GROUPS, SLOTS // SPAN, ROWS)
    offsets_at, offsets = scales_at, scales
    if has_offsets(FORMAT):
        offsets_at = _plane_at(planes, 2, first_row, ROWS, PAIRED)
        offsets = _plane_ring(planes, 2, GROUPS, SLOTS // SPAN, ROWS)
    factors_at, factors = scales_at, scales
    if FACTORS > 0:
        factors_at = _plane_at(planes, 4, first_row, ROWS, PAIRED)
        factors = _plane_ring(planes, 4, FACTORS, SLOTS // SPAN, ROWS)
    sources = words_at, high_at, scales_at, offsets_at, factors_at
    return sources, (words, high, scales, offsets, factors)


@gluon.jit
def _add_one(total, rings, x_tiles, step, i, begin, STAGES: gl.constexpr, TILES: gl.constexpr,
             WIDE: gl.constexpr, IS_SMALL: gl.constexpr, COMPUTE: gl.constexpr,
             FORMAT: gl.constexpr):  # fmt: skip
    """Returns total with the product of a step's tile i."""
    at = step % STAGES * TILES + i
    words, high = rings[0].index(at), rings[1].index(at)
    planes_of = rings[2].index(at), rings[3].index(at), rings[4].index(at)
    tile = words, high, planes_of, x_tiles.index(at)
    return add_tile(total, tile, begin + step * TILES + i, WIDE, IS_SMALL, COMPUTE, FORMAT)


@gluon.jit
def _add_step(total, rings, x_tiles, step, begin, STAGES: gl.constexpr, TILES: gl.constexpr,
              WIDE: gl.constexpr, LONE: gl.constexpr, IS_SMALL: gl.constexpr,
              COMPUTE: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Returns total with the products of a step's tiles: a LONE row's warps are few, and so see
    all of them at once."""
    if LONE:
        for i in gl.static_range(TILES):
            total = _add_one(
                *(total, rings, x_tiles, step, i, begin, STAGES, TILES, WIDE, IS_SMALL),
                *(COMPUTE, FORMAT),
            )
    else:
        for i in range(TILES):
            total = _add_one(
                *(total, rings, x_tiles, step, i, begin, STAGES, TILES, WIDE, IS_SMALL),
                *(COMPUTE, FORMAT),
            )
    return total


@gluon.jit
def _add_step_of_columns(total, rings, x_tiles, step, begin, STAGES: gl.constexpr,
                         TILES: gl.constexpr, IS_SMALL: gl.constexpr, COMPUTE: gl.constexpr,
                         FORMAT: gl.constexpr):  # fmt: skip
    """As `_add_step`, of one row of x by columns."""
    SPAN: gl.constexpr = span_of(FORMAT, TILES, True)
    SPANS: gl.constexpr = TILES // SPAN
    for i in gl.static_range(SPANS):
        slot = step % STAGES * SPANS + i
        planes_of = rings[2].index(slot), rings[3].index(slot), rings[4].index(slot)
        tiles = ()
        for one in gl.static_range(SPAN):
            at = slot * SPAN + one
            tiles = tiles + ((rings[0].index(at), rings[1].index(at), x_tiles.index(at)),)
        number = begin + step * TILES + i * SPAN
        total = add_span(total, (tiles, planes_of), number, SPAN, IS_SMALL, COMPUTE, FORMAT)
    return total


@gluon.jit
def columns_of_split(length, SPLITS: gl.constexpr, FORMAT: gl.constexpr):
    """Returns the first tile of program 1 of SPLITS, and the one after its last: whole blocks of
    those that share factors."""
    UNIT: gl.constexpr = 2 if factors_of_tile(FORMAT) > 0 else 1
    units = (length + UNIT * COLUMNS - 1) // (UNIT * COLUMNS)
    split = gl.program_id(1)
    return split * units // SPLITS * UNIT, (split + 1) * units // SPLITS * UNIT


@gluon.jit
def ring_sums(
    x, x_row, is_row, planes, first_row, length, begin, end,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    WIDE: gl.constexpr, EVEN_K: gl.constexpr, PAIRED: gl.constexpr, LONE: gl.constexpr,
    COMPUTE: gl.constexpr, FORMAT: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Returns weight @ x.T [ROWS, TOKENS] over tiles `begin` to `end` of COLUMNS columns.

    x: numbers of COMPUTE, rows of `length`; x_row, is_row [TOKENS]: which rows, in layout
    `x_rows_layout`, and whether there is one, else sums are 0; LONE: all are one row, is_row tells
    the first, and others have its sums or none. planes: two weights, of which ROWS rows count from
    first_row on: all of the first, or PAIRED, half of them from each, in turns of eight. A step has
    TILES tiles, and rings have room for STAGES steps. WIDE: as in `sums_layout`. EVEN_K: a row has
    whole tiles, else its last may be half of one. OVERLAP: the turn of the kernel has not come yet,
    as x_row does not depend on it.
    """
    gl.static_assert(not LONE or TOKENS == LONE_GROUPS)
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = STAGES * TILES
    SPAN: gl.constexpr = span_of(FORMAT, TILES, LONE)
    # Not where x goes to the tensor cores from shared memory; and sums that are short or shared out
    # lost more than they gained (H200).
    IS_SMALL: gl.constexpr = PAIRED and not WIDE and small_power(COMPUTE, FORMAT) > 0
    sums: gl.constexpr = sums_layout(TOKENS, WIDE, WARPS)
    x_copies: gl.constexpr = _copies_layout(COLUMNS, WARPS)
    sources, rings = _sources_and_rings(
        *(planes, first_row, length, SLOTS, SPAN, ROWS, PAIRED, LONE, FORMAT)
    )
    stride = planes[0][5]
    x_tiles = gl.allocate_shared_memory(COMPUTE, [SLOTS, TOKENS, COLUMNS], _x_layout(WIDE))
    x_at = x + x_row.to(gl.int64)[:, None] * (length // HALF * HALF)
    x_at = x_at + gl.arange(0, COLUMNS, gl.SliceLayout(0, x_copies))[None, :]
    is_row = is_row[:, None]
    if OVERLAP:
        for step in range(STAGES - 1):
            _bring_weight(
                *(sources, rings, step, begin, end, stride, length),
                *(STAGES, TILES, EVEN_K, LONE, FORMAT),
            )
    if OVERLAP:
        gdc_wait()
    for step in range(STAGES - 1):
        if not OVERLAP:
            _bring_weight(
                *(sources, rings, step, begin, end, stride, length),
                *(STAGES, TILES, EVEN_K, LONE, FORMAT),
            )
        _bring_x(
            *(x_at, is_row, x_tiles, step, begin, end, length),
            *(STAGES, TILES, EVEN_K, LONE, FORMAT),
        )
        async_copy.commit_group()
    total = gl.zeros([ROWS, TOKENS], gl.float32, sums)
    num_steps = (end - begin + TILES - 1) // TILES
    for step in range(num_steps):
        async_copy.wait_group(STAGES - 2)
        if WIDE:
            fence_async_shared()
            gl.thread_barrier()
        ahead = step + STAGES - 1
        if ahead < num_steps:
            _bring_weight(
                *(sources, rings, ahead, begin, end, stride, length),
                *(STAGES, TILES, EVEN_K, LONE, FORMAT),
            )
            _bring_x(
                *(x_at, is_row, x_tiles, ahead, begin, end, length),
                *(STAGES, TILES, EVEN_K, LONE, FORMAT),
            )
        async_copy.commit_group()
        if is_by_columns(FORMAT, LONE):
            total = _add_step_of_columns(
                total, rings, x_tiles, step, begin, STAGES, TILES, IS_SMALL, COMPUTE, FORMAT
            )
        else:
            total = _add_step(
                *(total, rings, x_tiles, step, begin, STAGES, TILES, WIDE, LONE, IS_SMALL),
                *(COMPUTE, FORMAT),
            )
    async_copy.wait_group(0)
    if IS_SMALL:
        total *= lost_power(COMPUTE, FORMAT)
    if is_by_columns(FORMAT, LONE):
        total = gl.sum(total, 1)[:, None].broadcast_to([ROWS, TOKENS])
    if factor_of(FORMAT) == "row":
        of_sums: gl.constexpr = gl.SliceLayout(1, sums)
        first, second = planes
        total *= gl.load(_rows_at(first[4], second[4], first_row, 1, ROWS, PAIRED, of_sums))[
            :, None
        ]
    return total
