"""Attention of single queries over compressed keys and values: query heads are columns of products.

Called by attention/decode.py where `fits` says so and no row is to be invariant. A row's keys are
shared out among programs (shares.py), and a program's among its warps, each with its own softmax.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.inputs import AttentionOp, KVLayer
from octavo.kernels.triton.attention.hopper.packed_products import (
    load_queries,
    no_sums,
    num_parts,
    products_layout,
    step_of,
)
from octavo.kernels.triton.attention.hopper.packed_scales import load_scales
from octavo.kernels.triton.attention.hopper.packed_softmax import (
    add_tile,
    higher,
    joined,
    merge_warps,
    origin_of,
    visible_scores,
)
from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS, load_words
from octavo.kernels.triton.attention.hopper.shares import (
    merge_shares,
    mixed,
    partials_of,
    share_of,
)
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.attention.single_rows import SingleRows
from octavo.kernels.triton.launching.chip import has_wgmma, next_power_of_2, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.visibility import Full

UNSPECIALISED = ["num_partials", "stride_table"]
WARPS = 4
PROGRAMS = 2
"""Of a processor at once."""
REGISTERS = 255
"""That a thread may have for it: with fewer, loads are not far ahead of where they are used."""
MOST_HEADS = 16
"""Of a kv head."""
MOST_GROWTH = gl.constexpr(48)
"""How many powers of two a weight may be above those of the first tiles: with RAISED and the scales
of values they have 127."""


@gluon.jit
def _page(table_row, first, end, P: gl.constexpr):
    """Returns the page [W] of each warp's tile from position `first` [W] on."""
    return gl.load(table_row + first // P, mask=first < end, other=0)


@gluon.jit
def _load(
    plane, page, first, end, K: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
    FORMAT: gl.constexpr, IS_KEY: gl.constexpr,
):  # fmt: skip
    """Returns (words, scales) of the keys or values of each warp's tile."""
    COUNT: gl.constexpr = num_parts(FORMAT, D)
    inside, live = first * 0 if P == TOKENS else first % P, end - first
    return (
        load_words(plane, page, inside, live, K, D, FORMAT, IS_KEY),
        load_scales(plane, page, inside, live, K, COUNT, IS_KEY),
    )


@gluon.jit
def _store(means, lse, place, out, partial_out, partial_lse, firsts, stride,
           H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, UNMIX: gl.constexpr):  # fmt: skip
    """Stores at `out` what is its row's only result, and else at its partial result."""
    t, _, heads, split, num_busy, before = place
    x = joined(means)
    wide: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    x = gl.convert_layout(x, wide)
    head = gl.arange(0, x.shape[0], gl.SliceLayout(1, wide))
    columns = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    if num_busy + before > 1:
        to = firsts + head * stride + before + split
        gl.store(partial_out + to[:, None] * D + columns, x, (head < GROUP)[:, None])
        gl.store(partial_lse + to, gl.convert_layout(lse, gl.SliceLayout(1, wide)), head < GROUP)
    else:
        if UNMIX:
            x = mixed(x)
        whole = out + (t * H + heads + head)[:, None] * D + columns
        gl.store(whole, x.to(out.dtype.element_ty), (head < GROUP)[:, None])


@gluon.jit
def _attend(
    q, keys, values, table_row, work, place, scale_log2, tile_keys, tile_values, page,
    H: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr, K: gl.constexpr, D: gl.constexpr,
    P: gl.constexpr, HAS_SHARED: gl.constexpr, HEADS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Returns what `merge_warps` does of this program's share, whose first tile is there."""
    t, _, first_head, _, _, _ = place
    low, _, end, first_tile, tiles = work
    W: gl.constexpr = gl.num_warps()
    N: gl.constexpr = W * TOKENS
    begin = first_tile * N + TOKENS * gl.arange(0, W, page.type.layout)
    queries = load_queries(q, t * H + first_head, H // K, HEADS, D, KEY, mma)
    scale_log2 = scale_log2 / step_of(KEY, 0)
    # All weights of a share are of one origin: the largest score of its first tiles. There is room
    # for much larger ones; where that is not enough, all begins again, once, with the largest.
    s = visible_scores(queries, tile_keys, begin, low, end, K, KEY, HAS_SHARED, mma)
    top = higher(s)
    origin = origin_of(top, scale_log2, mma)
    sums, weights = no_sums(D, HEADS, VALUE, mma)
    state = (top, sums, weights)
    turns = (tiles + 1) // 2
    left = turns
    while left > 0:
        first = begin
        third_page = _page(table_row, first + 2 * N, end, P)
        tile_next = _page(table_row, first + N, end, P)
        # Two tiles a turn: what is loaded meanwhile is where the next turn wants it. One too many
        # is all hidden.
        for _ in range(left):
            # Pages are the same in a warp, which waits for them where they are handed on: long
            # after.
            fourth_page = _page(table_row, first + 3 * N, end, P)
            fifth_page = _page(table_row, first + 4 * N, end, P)
            other_keys = _load(keys, tile_next, first + N, end, K, D, P, KEY, True)
            other_values = _load(values, tile_next, first + N, end, K, D, P, VALUE, False)
            s = visible_scores(queries, tile_keys, first, low, end, K, KEY, HAS_SHARED, mma)
            state = add_tile(state, s, origin, scale_log2, tile_values, K, VALUE, mma)
            tile_keys = _load(keys, third_page, first + 2 * N, end, K, D, P, KEY, True)
            tile_values = _load(values, third_page, first + 2 * N, end, K, D, P, VALUE, False)
            s = visible_scores(queries, other_keys, first + N, low, end, K, KEY, HAS_SHARED, mma)
            state = add_tile(state, s, origin, scale_log2, other_values, K, VALUE, mma)
            first = first + 2 * N
            tile_next = fourth_page
            third_page = fifth_page
        highest = origin_of(state[0], scale_log2, mma)
        left = left * 0
        if gl.max(highest - origin, 0) > MOST_GROWTH:
            origin = highest
            state = (state[0], sums, weights)
            begin_page = _page(table_row, begin, end, P)
            tile_keys = _load(keys, begin_page, begin, end, K, D, P, KEY, True)
            tile_values = _load(values, begin_page, begin, end, K, D, P, VALUE, False)
            left = turns
    return merge_warps(state, origin, VALUE, mma)


@launchable
@gluon.jit(do_not_specialize=UNSPECIALISED)
def _lone_rows_kernel(
    out,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    shared_tokens,
    shared_partials,
    partial_starts,
    num_partials,
    tickets,
    q,
    key,
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    block_table,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    KEY: gl.constexpr,
    VALUE: gl.constexpr,
    K: gl.constexpr,
    D: gl.constexpr,
    P: gl.constexpr,
    HAS_SHARED: gl.constexpr,
    PACKED: gl.constexpr,
    HEADS: gl.constexpr,
    MERGED: gl.constexpr,
    UNMIX: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """The H // K query heads of a kv head (`program 0`) of a sequence (1) with one query, a share
    (2) of its keys.

    out [T, H, D] = softmax(scale q k^T) v over [low, length). Planes as in attention/decode.py, as
    are partial results, PACKED and HAS_SHARED, but that a share leaves one. HEADS >= H // K. UNMIX:
    values are mixed (`kv_codec.mix`), and out is not to be. Programs of a row must be able to run
    at the same time.
    """
    GROUP: gl.constexpr = H // K
    W: gl.constexpr = gl.num_warps()
    N: gl.constexpr = W * TOKENS
    mma: gl.constexpr = products_layout(W)
    one: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, mma))
    place, work = share_of(
        query_starts, seq_lens, shared_tokens, shared_partials, GROUP, HAS_SHARED, N
    )
    _, sequence, _, _, _, _ = place
    _, length, end, first_tile, tiles = work
    firsts, stride = partials_of(place, partial_starts, num_partials, H, PACKED)
    kv_head = gl.program_id(0)
    ticket = tickets + gl.program_id(1) * K + kv_head
    KEY_BYTES: gl.constexpr = D // 2 if KEY == "int4" else D
    VALUE_BYTES: gl.constexpr = D // 2 if VALUE == "int4" else D
    keys = (key + kv_head * KEY_BYTES, key_scale, stride_key, stride_key_scale, kv_head)
    values = (value + kv_head * VALUE_BYTES, value_scale, stride_value, stride_value_scale, kv_head)
    table_row = block_table + sequence * stride_table
    first = first_tile * N + TOKENS * gl.arange(0, W, one)
    page = _page(table_row, first, end, P)
    # All but the newest token was written before the kernel whose end is waited for.
    has_newest = (tiles == 1) & (end == length)
    early = gl.where(has_newest, 0, end)
    tile_keys = _load(keys, page, first, early, K, D, P, KEY, True)
    tile_values = _load(values, page, first, early, K, D, P, VALUE, False)
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    if tiles > 0:
        if has_newest:
            tile_keys = _load(keys, page, first, end, K, D, P, KEY, True)
            tile_values = _load(values, page, first, end, K, D, P, VALUE, False)
        means, lse = _attend(
            q, keys, values, table_row, work, place, scale_log2, tile_keys, tile_values, page,
            H, KEY, VALUE, K, D, P, HAS_SHARED, HEADS, mma,
        )  # fmt: skip
        _store(means, lse, place, out, partial_out, partial_lse, firsts, stride, H, GROUP, D, UNMIX)
    merge_shares(
        *(out, partial_out, partial_lse, place, tiles, firsts, stride, ticket),
        *(H, GROUP, D, MERGED, UNMIX),
    )


def fits(q: Tensor, op: AttentionOp, layer: KVLayer) -> bool:
    """Whether the kernel here can take a layer whose queries are of the dtype and the device of
    `q`; never depends on the step."""
    block_size, num_kv_heads = layer.key.shape[1:3]
    return (
        op.visibility == Full()
        and op.soft_cap is None
        and op.sinks_H is None
        and layer.key_scale is not None
        and layer.value_scale is not None
        and q.element_size() == 2
        and op.head_size in (64, 128, 256)
        and op.num_heads // num_kv_heads <= MOST_HEADS
        and block_size % TOKENS.value == 0
        and has_wgmma(q.device)
    )


def lone_rows(asked: SingleRows, *, unmixes: bool = False) -> None:
    """Writes the rows of `asked.out` that belong to sequences with one query: see
    `decode_attention`. `unmixes`: whether values are stored mixed, and `out` is to have their sums
    in their own basis."""
    out, batch, partials = asked.out, asked.batch, asked.partials
    planes, unused = planes_of(out, asked.layer, batch), batch.seq_lens_S
    rows, group = asked.count, out.shape[1] // planes.num_heads
    processors, pieces = num_processors(out.device), rows * planes.num_heads
    assert asked.q_THD.is_contiguous()
    assert pieces <= len(asked.tickets), (rows, planes.num_heads)
    programs = min(asked.most_partials, max(1, PROGRAMS * processors // pieces))
    _lone_rows_kernel[(planes.num_heads, rows, programs)](
        *(out, partials.out, partials.lse),
        *(batch.query_starts, batch.seq_lens_S, *(asked.shared or (unused, unused))),
        unused if partials.starts is None else partials.starts,
        partials.num_partials,
        asked.tickets,
        asked.q_THD,
        *planes.arguments,
        batch.block_table,
        batch.block_table.stride(0),
        asked.op.scale * LOG2_E,
        H=out.shape[1],
        **planes.constants,
        HAS_SHARED=asked.shared is not None,
        PACKED=partials.starts is not None,
        HEADS=max(8, next_power_of_2(group)),
        UNMIX=unmixes,
        # As many heads at a time as leave one turn to each of a row's programs.
        MERGED=4 if programs <= 4 else 2 if programs <= 8 else 1,
        num_warps=WARPS,
        maxnreg=REGISTERS,
        **launch_options(out.device),
    )
