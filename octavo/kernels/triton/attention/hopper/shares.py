"""How a single query's keys are shared out among programs, and how these merge what they found.

Called by the kernels whose programs of a row run at the same time (lone.py here and of latent/):
each waits for the others' partial results and merges its share of the heads: one kernel, whatever
the length.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels import kv_codec

mixed_size = gluon.constexpr_function(kv_codec.mixed_size)
LOADED = gl.constexpr(16)
"""Partial results that a program loads at a time, of one head or more."""


@gluon.jit
def share_of(
    query_starts, seq_lens, shared_tokens, shared_partials, GROUP: gl.constexpr,
    HAS_SHARED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Returns (t, sequence, heads, split, num_busy, before), (low, length, end, first_tile, tiles).

    GROUP heads from `heads` on (`program 0`) of the token t of a sequence (1) with one query; a
    share (2), one of num_busy, of its keys [low, length): `tiles` of BLOCK_N from first_tile on, up
    to `end`. `before`: partial results that are there already. Nothing if there are more queries.
    """
    sequence = gl.program_id(1).to(gl.int64)
    t = gl.load(query_starts + sequence).to(gl.int64)
    num_queries = gl.load(query_starts + sequence + 1) - t
    length = gl.load(seq_lens + sequence)
    low = length * 0
    before = length * 0
    if HAS_SHARED:
        low = gl.load(shared_tokens + sequence)
        before = gl.load(shared_partials + sequence)
    split = gl.program_id(2)
    origin = low // BLOCK_N
    all_tiles = gl.maximum(gl.cdiv(length, BLOCK_N) - origin, 0)
    all_tiles = gl.where(length > low, all_tiles, 0)
    # No more partial results than SPLIT_CLASSES has splits.
    least = gl.where(length - low <= 16384, 256 // BLOCK_N, 512 // BLOCK_N)
    least = gl.where(length - low <= 4096, 128 // BLOCK_N, least)
    least = gl.where(length - low <= 1024, 1, least)
    share = gl.maximum(gl.cdiv(all_tiles, gl.num_programs(2)), least)
    num_busy = gl.maximum(gl.cdiv(all_tiles, share), 1)
    tiles = gl.maximum(gl.minimum(share, all_tiles - split * share), 0)
    first_tile = origin + split * share
    end = gl.minimum((first_tile + tiles) * BLOCK_N, length)
    if num_queries != 1:
        tiles = tiles * 0
        before = before * 0
        num_busy = num_busy * 0
    heads = gl.program_id(0) * GROUP
    return (t, sequence, heads, split, num_busy, before), (low, length, end, first_tile, tiles)


@gluon.jit
def partials_of(place, partial_starts, num_partials, H: gl.constexpr, PACKED: gl.constexpr):
    """Returns the first partial result of the first head, and how far the next head's is away: see
    `Partials`."""
    _, sequence, heads, _, _, _ = place
    first = sequence * num_partials
    stride = num_partials.to(gl.int64)
    if PACKED:
        first = gl.load(partial_starts + sequence).to(gl.int64)
        stride = gl.load(partial_starts + sequence + 1) - first
    return first * H + heads * stride, stride


@gluon.constexpr_function
def _steps(size: int) -> int:
    return size.bit_length() - 1


@gluon.jit
def mixed(x):
    """Returns x [R, D] as `kv_codec.mix` does: of each bit of the place of a number, the lowest is
    mixed and becomes the highest, so that at the end all are where they were."""
    R: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    SIZE: gl.constexpr = mixed_size(D)
    ROWS: gl.constexpr = R * D // SIZE
    layout: gl.constexpr = gl.BlockedLayout([1, SIZE // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    y = x.reshape([ROWS, SIZE])
    for step in gl.static_range(_steps(SIZE)):
        if step % _steps(SIZE // 32) == 0:  # what a thread has of a row is mixed
            y = gl.convert_layout(y, layout)
        low, high = gl.split(y.reshape([ROWS, SIZE // 2, 2]))
        y = gl.join(low + high, low - high).permute((0, 2, 1)).reshape([ROWS, SIZE])
    y = gl.convert_layout(y, layout) * SIZE**-0.5
    return gl.convert_layout(y.reshape([R, D]), x.type.layout)


@gluon.constexpr_function
def _merging(size: int, warps: int) -> gl.BlockedLayout:
    across = min(warps, size // 32)
    return gl.BlockedLayout(
        [1, 1, size // (32 * across)], [1, 1, 32], [1, warps // across, across], [2, 1, 0]
    )


@gluon.jit
def _merge(
    out, partial_out, partial_lse, heads, t, firsts, stride, count, begin, step,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr,
    UNMIX: gl.constexpr,
):  # fmt: skip
    """out[t, heads + h] = sum_i w_i o_i / sum_i w_i, w_i = 2^lse_i, over the `count` partials of
    each head h < GROUP from firsts + h * stride on, HEADS at a time: `begin`, `begin + step` ..."""
    SLOTS: gl.constexpr = LOADED // HEADS
    layout: gl.constexpr = _merging(D, gl.num_warps())
    pairs: gl.constexpr = gl.SliceLayout(2, layout)
    ends: gl.constexpr = gl.SliceLayout(1, layout)
    slots = gl.arange(0, SLOTS, gl.SliceLayout(0, pairs))[None, :]
    columns = gl.arange(0, D, gl.SliceLayout(0, ends))[None, :]
    for unit in range(begin, (GROUP + HEADS - 1) // HEADS, step):
        head = unit * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, pairs))[:, None]
        top = gl.full([HEADS, SLOTS], -float("inf"), gl.float32, pairs)
        total = gl.zeros([HEADS, SLOTS], gl.float32, pairs)
        acc = gl.zeros([HEADS, SLOTS, D], gl.float32, layout)
        for start in range(0, count, SLOTS):
            at = firsts + head * stride + (start + slots)
            live = (start + slots < count) & (head < GROUP)
            lse = gl.load(partial_lse + at, mask=live, other=-float("inf"), cache_modifier=".cg")
            there = partial_out + at[:, :, None] * D + columns[:, None, :]
            x = gl.load(there, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
            higher = gl.maximum(top, lse)
            floor = gl.where(higher == -float("inf"), 0.0, higher)
            w, shrink = gl.exp2(lse - floor), gl.exp2(top - floor)
            acc = acc * shrink[:, :, None] + x * w[:, :, None]
            total = total * shrink + w
            top = higher
        highest = gl.max(top, 1)
        w = gl.exp2(top - gl.where(highest == -float("inf"), 0.0, highest)[:, None])
        whole = gl.convert_layout(gl.sum(total * w, 1), gl.SliceLayout(1, ends))
        mean = gl.sum(acc * w[:, :, None], 1) / gl.where(whole > 0, whole, 1.0)[:, None]
        if UNMIX:
            mean = mixed(mean)
        mine = unit * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, ends))
        to = out + (t * H + heads + mine)[:, None] * D + columns
        gl.store(to, mean.to(out.dtype.element_ty), mask=(mine < GROUP)[:, None])


@gluon.jit
def merge_shares(
    out, partial_out, partial_lse, place, tiles, firsts, stride, ticket,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr,
    UNMIX: gl.constexpr = False,
):  # fmt: skip
    """Waits until all programs of the row have stored their partial results, and merges this
    program's heads. A row that saw nothing gets zeros."""
    t, _, heads, split, num_busy, before = place
    # Where there was nothing to see, a merge of nothing stores zeros.
    if ((num_busy + before > 1) | (tiles == 0)) & (split < num_busy):
        if num_busy > 1:
            gl.thread_barrier()  # All threads have stored before one of them tells so.
            arrived = gl.atomic_add(ticket, 1, sem="acq_rel") + 1
            while arrived % 65536 < num_busy:
                arrived = gl.atomic_add(ticket, 0, sem="acquire")
            gl.thread_barrier()
            left = gl.atomic_add(ticket, 65536, sem="relaxed") // 65536 + 1
            if left == num_busy:
                gl.store(ticket, 0)
        count = before + num_busy
        if tiles == 0:
            count = before
        _merge(
            out, partial_out, partial_lse, heads, t, firsts, stride, count, split, num_busy, H,
            GROUP, D, HEADS, UNMIX,
        )  # fmt: skip
