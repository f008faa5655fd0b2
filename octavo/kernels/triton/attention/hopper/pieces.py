"""How attention on Hopper is cut into pieces: which rows, of which keys, whose turn.

Called by both roles of the kernel (kernel.py), which so agree without a word. Never
touches keys, values or results.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LONG, SHORT, SHARED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Forms of the kernel: what `_hopper_kernel` says of them."""
ROWS = gl.constexpr(64)
"""Rows of one consumer, which is one warpgroup; a program has two."""


@gluon.jit
def find(starts, num_sequences, tile, QUERIES: gl.constexpr):
    """Returns the last s with starts[s] // QUERIES + s <= tile; QUERIES 0: starts[s] <= tile."""
    sequence = tile * 0
    beyond = sequence + num_sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        first = gl.load(starts + middle)
        if QUERIES > 0:
            first = first // QUERIES + middle
        if first <= tile:
            sequence = middle
        else:
            beyond = middle
    return sequence


@gluon.jit
def piece(
    turn, plan, N: gl.constexpr, H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr,
    MOST: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Returns what this program does `turn`-th: (heads, split, sequence whose KV it is, row of the
    first query, queries, first query here, first KV tile, KV tiles, length, splits of it, partials
    before the sequence's), pieces of M rows. No KV tiles: nothing. Only SHORT counts splits and
    partials.

    LONG: from the last (the longest) queries to the first, heads fastest; programs take pieces in
    turn, every other time in reverse, so that all have as much to do. Else by owners, queries
    fastest (those who read the same keys do so at the same time), and only what is there: where all
    have few pieces, an empty one would leave a processor idle.
    """
    starts, lengths, members, _, sizes, piece_starts, num_owners, num_tiles, pieces = plan
    GROUPS: gl.constexpr = H // STACK
    QUERIES: gl.constexpr = M // STACK
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = place + turn % 2 * (programs - 1 - 2 * place)
    index = turn * programs + place
    if FORM == LONG:
        tile = gl.maximum(num_tiles - 1 - index // GROUPS, 0)
        owner = find(starts, num_owners, tile, QUERIES)
    else:
        owner = find(piece_starts, num_owners, index // GROUPS, 0)
    row = gl.load(starts + owner)
    count = gl.load(starts + owner + 1) - row
    if FORM == LONG:
        heads = index % GROUPS
        split = index * 0
        first = (tile - (row // QUERIES + owner)) * QUERIES
    else:
        here = index - gl.load(piece_starts + owner) * GROUPS
        tiles = gl.maximum(gl.cdiv(count, QUERIES), 1)
        heads = here // tiles % GROUPS
        split = here // tiles // GROUPS
        first = here % tiles * QUERIES
    parts = index * 0 + 1
    base_partial = (index * 0).to(gl.int64)
    is_mine = (first < count) & (index < pieces)
    if FORM == SHARED:
        sequence = gl.load(members + row, mask=is_mine, other=0)
        length = gl.load(lengths + sequence)
        end = length
        size = gl.load(sizes + owner)
    else:
        sequence = owner
        length = gl.load(lengths + sequence)
        end = length - count + gl.minimum(first + QUERIES, count)
        size = length
    if FORM == SHORT:
        size = gl.load(sizes + 3 * (num_owners + 1))
        parts = gl.cdiv(length, size)
        base_partial = gl.load(sizes + num_owners + 1 + owner).to(gl.int64)
    if FORM == LONG:
        is_mine &= count > MOST
    start = split * size
    tiles = gl.maximum(gl.cdiv(gl.minimum(end, start + size) - start, N), 0)
    if not is_mine:
        tiles = tiles * 0
    return (
        heads, split, sequence, row, count, first, start // N, tiles, length, parts, base_partial,
    )  # fmt: skip


@gluon.jit
def rows_of(
    plan, heads, row, first, count, H: gl.constexpr, STACK: gl.constexpr, FORM: gl.constexpr,
    M: gl.constexpr, layout: gl.constexpr, BY_SEQUENCE: gl.constexpr = False,
):  # fmt: skip
    """Returns ((row of the batch, head) as one number, whether there is one) of M stacked rows:
    STACK heads of each query from `first` on. BY_SEQUENCE: of SHARED the sequence in place of its
    row, as partial results of single queries lie."""
    _, _, members, query_starts, _, _, _, _, _ = plan
    rows = gl.arange(0, M, layout)
    query = first + rows // STACK
    live = query < count
    t = row + query
    if FORM == SHARED:
        t = gl.load(members + t, mask=live, other=0)
        if not BY_SEQUENCE:
            t = gl.load(query_starts + t, mask=live, other=0)
    return t.to(gl.int64) * H + heads * STACK + rows % STACK, live
