"""Attention of single queries over compressed keys and values: query heads are columns of products.

Called by attention/decode.py where `fits` says so and no row is to be invariant. A row's keys are
shared out among programs (shares.py), and a program's among its warps, each with its own softmax.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.hopper.packed_tiles import (
    TOKENS,
    add_values,
    largest,
    load_queries,
    load_scales,
    load_words,
    part_size,
    products_layout,
    scores,
)
from octavo.kernels.triton.attention.hopper.shares import merge_shares, partials_of, share_of
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.launching.chip import has_wgmma, next_power_of_2, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.visibility import Full

UNSPECIALISED = ["num_partials", "stride_table"]
WARPS = 4


class Crowd(NamedTuple):
    """Programs that a processor runs at once, and registers that a thread may have for it."""

    programs: int
    registers: int


USUAL = Crowd(3, 168)
DENSE = Crowd(4, 128)
"""Slower each, but where a wave of them takes all rows."""
MOST_HEADS = 16
"""Of a kv head."""


@gluon.jit
def _page(table_row, first, end, P: gl.constexpr):
    """Returns the page [W] of each warp's tile from position `first` [W] on."""
    return gl.load(table_row + first // P, mask=first < end, other=0).to(gl.int64)


@gluon.jit
def _load(
    plane, page, first, end, K: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
    FORMAT: gl.constexpr, IS_KEY: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Returns (words, scales) of the keys or values of each warp's tile."""
    tokens: gl.constexpr = gl.SliceLayout(2, mma if IS_KEY else gl.DotOperandLayout(1, mma, 2))
    COUNT: gl.constexpr = D // part_size(FORMAT, D)
    inside, live = first % P, end - first
    return (
        load_words(plane, page, inside, live, K, D, FORMAT, IS_KEY),
        load_scales(plane, page, inside, live, K, COUNT, IS_KEY, tokens),
    )


@gluon.jit
def _exponents(
    queries, tile, first, low, end, scale_log2, FORMAT: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """Returns scores as exponents of 2 [W, TOKENS, HEADS], -inf where not visible."""
    words, scales = tile
    tokens: gl.constexpr = gl.SliceLayout(2, mma)
    n = gl.convert_layout(first, gl.SliceLayout(1, tokens))[:, None]
    n = n + gl.arange(0, TOKENS, gl.SliceLayout(0, tokens))[None, :]
    s = scores(queries, words, scales, FORMAT, mma) * scale_log2
    return gl.where(((n >= low) & (n < end))[:, :, None], s, -float("inf"))


@gluon.jit
def _add(state, s, tile, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns the running softmax of each warp with its tile, of exponents s, added.

    State: m [W, HEADS], total [W, TOKENS, HEADS] not yet summed over tokens, sums (parts [W, PART,
    HEADS]) in units of unit [W].
    """
    m, total, sums, unit = state
    words, scales = tile
    higher, larger = gl.maximum(m, gl.max(s, 1)), gl.maximum(unit, largest(scales))
    floor = gl.where(higher == -float("inf"), 0.0, higher)
    p, shrink = gl.exp2(s - floor[:, None, :]), gl.exp2(m - floor)
    total = total * shrink[:, None, :] + p
    of_unit = gl.convert_layout(unit / larger, gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    by = (shrink * of_unit[:, None])[:, None, :]
    shrunk = ()
    for i in gl.static_range(len(sums)):
        shrunk = shrunk + (sums[i] * by,)
    return higher, total, add_values(shrunk, p, words, scales, larger, FORMAT, mma), larger


@gluon.jit
def _merge_warps(state, mma: gl.constexpr):
    """Returns (sums of parts [PART, HEADS] over total, log2-sum-exp2 [HEADS]) of all warps."""
    m, total, sums, unit = state
    heads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, mma))
    highest = gl.max(m, 0)
    floor = gl.where(highest == -float("inf"), 0.0, highest)
    w = gl.exp2(m - floor[None, :])
    whole = gl.sum(gl.sum(total, 1) * w, 0)
    whole = gl.where(whole > 0, whole, 1.0)
    of_unit = gl.convert_layout(unit, gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    by = (w * of_unit[:, None])[:, None, :]
    means = ()
    for i in gl.static_range(len(sums)):
        part = gl.sum(sums[i] * by, 0)
        inverse = gl.convert_layout(1.0 / whole, gl.SliceLayout(0, part.type.layout))
        means = means + (part * inverse[None, :],)
    return means, gl.convert_layout(highest + gl.log2(whole), heads)


@gluon.jit
def _store(means, lse, place, out, partial_out, partial_lse, firsts, stride,
           H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Stores at `out` what is its row's only result, and else at its partial result."""
    t, _, heads, split, num_busy, before = place
    PART: gl.constexpr = means[0].shape[0]
    HEADS: gl.constexpr = means[0].shape[1]
    is_alone = (num_busy == 1) & (before == 0)
    wide: gl.constexpr = gl.BlockedLayout([1, PART // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, wide))
    columns = gl.arange(0, PART, gl.SliceLayout(0, wide))[None, :]
    to = firsts + head * stride + before + split
    for i in gl.static_range(len(means)):
        x = means[i].reshape([PART // 8, 8, HEADS]).permute((2, 1, 0)).reshape([HEADS, PART])
        x = gl.convert_layout(x, wide)
        at = columns + i * PART
        whole = out + (t * H + heads + head)[:, None] * D + at
        gl.store(whole, x.to(out.dtype.element_ty), ((head < GROUP) & is_alone)[:, None])
        live = ((head < GROUP) & (num_busy + before > 1))[:, None]
        gl.store(partial_out + to[:, None] * D + at, x, live)
    live = (head < GROUP) & (num_busy + before > 1)
    gl.store(partial_lse + to, gl.convert_layout(lse, gl.SliceLayout(1, wide)), live)


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
    OVERLAP: gl.constexpr,
):
    """The H // K query heads of a kv head (`program 0`) of a sequence (1) with one query, a share
    (2) of its keys.

    out [T, H, D] = softmax(scale q k^T) v over [low, length). Planes as in attention/decode.py, as
    are partial results, PACKED and HAS_SHARED, but that a share leaves one. HEADS >= H // K.
    Programs of a row must be able to run at the same time.
    """
    GROUP: gl.constexpr = H // K
    W: gl.constexpr = gl.num_warps()
    N: gl.constexpr = W * TOKENS
    mma: gl.constexpr = products_layout(W)
    heads: gl.constexpr = gl.SliceLayout(1, mma)
    one: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, mma))
    weight_tokens: gl.constexpr = gl.SliceLayout(2, gl.DotOperandLayout(1, mma, 2))
    place, work = share_of(
        query_starts, seq_lens, shared_tokens, shared_partials, GROUP, HAS_SHARED, N
    )
    t, sequence, first_head, _, _, _ = place
    low, length, end, first_tile, tiles = work
    firsts, stride = partials_of(place, partial_starts, num_partials, H, PACKED)
    ticket = tickets + gl.program_id(1) * K + gl.program_id(0)
    kv_head = gl.program_id(0)
    KEY_BYTES: gl.constexpr = D // 2 if KEY == "int4" else D
    VALUE_BYTES: gl.constexpr = D // 2 if VALUE == "int4" else D
    keys = (key + kv_head * KEY_BYTES, key_scale, stride_key, stride_key_scale, kv_head)
    values = (value + kv_head * VALUE_BYTES, value_scale, stride_value, stride_value_scale, kv_head)
    table_row = block_table + sequence * stride_table
    first = first_tile * N + TOKENS * gl.arange(0, W, one)
    page = _page(table_row, first, end, P)
    next_page = _page(table_row, first + N, end, P)
    # All but the newest token was written before the kernel whose end is waited for.
    has_newest = (tiles == 1) & (end == length)
    early = gl.where(has_newest, 0, end)
    key_tile = _load(keys, page, first, early, K, D, P, KEY, True, mma)
    value_tile = _load(values, page, first, early, K, D, P, VALUE, False, mma)
    if OVERLAP:
        gdc_wait()
    if OVERLAP:
        gdc_launch_dependents()
    if tiles > 0:
        if has_newest:
            key_tile = _load(keys, page, first, end, K, D, P, KEY, True, mma)
            value_tile = _load(values, page, first, end, K, D, P, VALUE, False, mma)
        queries = load_queries(q, t * H + first_head, GROUP, HEADS, D, part_size(KEY, D), mma)
        sums = ()
        for part in gl.static_range(D // part_size(VALUE, D)):
            sums = sums + (gl.zeros([W, part_size(VALUE, D), HEADS], gl.float32, mma),)
        state = (
            gl.full([W, HEADS], -float("inf"), gl.float32, heads),
            gl.zeros([W, TOKENS, HEADS], gl.float32, mma),
            sums,
            gl.full([W], 1e-30, gl.float32, gl.SliceLayout(1, weight_tokens)),
        )
        for tile in range(tiles):
            s = _exponents(queries, key_tile, first, low, end, scale_log2, KEY, mma)
            # The next keys are on their way while values are added, and values while keys are.
            first = first + N
            key_tile = _load(keys, next_page, first, end, K, D, P, KEY, True, mma)
            state = _add(state, s, value_tile, VALUE, mma)
            value_tile = _load(values, next_page, first, end, K, D, P, VALUE, False, mma)
            next_page = _page(table_row, first + N, end, P)
        means, lse = _merge_warps(state, mma)
        _store(means, lse, place, out, partial_out, partial_lse, firsts, stride, H, GROUP, D)
    merge_shares(
        out, partial_out, partial_lse, place, tiles, firsts, stride, ticket, H, GROUP, D, MERGED
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


def lone_rows(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    partials: Partials,
    tickets: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    most_shares: int,
) -> None:
    """Writes the rows of `out` that belong to sequences with one query: see `decode_attention`.
    `most_shares`: partial results that a row has room for."""
    planes, unused = planes_of(out, layer, batch), batch.seq_lens_S
    rows, group = len(batch.seq_lens_S), out.shape[1] // planes.num_heads
    processors, pieces = num_processors(q_THD.device), rows * planes.num_heads
    assert pieces <= len(tickets), (rows, planes.num_heads)
    crowd = USUAL if pieces <= USUAL.programs * processors else DENSE
    programs = min(most_shares, max(1, crowd.programs * processors // pieces))
    _lone_rows_kernel[(planes.num_heads, rows, programs)](
        *(out, partials.out, partials.lse),
        *(batch.query_starts, batch.seq_lens_S, *(shared or (unused, unused))),
        unused if partials.starts is None else partials.starts,
        partials.num_partials,
        tickets,
        q_THD,
        *planes.arguments,
        batch.block_table,
        batch.block_table.stride(0),
        op.scale * LOG2_E,
        H=out.shape[1],
        **planes.constants,
        HAS_SHARED=shared is not None,
        PACKED=partials.starts is not None,
        HEADS=max(8, next_power_of_2(group)),
        # As many heads at a time as leave one turn to each of a row's programs.
        MERGED=4 if programs <= 4 else 2 if programs <= 8 else 1,
        num_warps=WARPS,
        maxnreg=crowd.registers,
        **launch_options(q_THD.device),
    )
