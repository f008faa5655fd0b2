"""How a program finds the rows of its expert: by looking through all pairs, or in their order.

Called by the kernels of `grouped.py`. Few pairs are looked through by every program ("scan"): a
launch less than sorting takes. Many are sorted first (`sort.py`), and a program has a block of them
("order").
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.grid import tile_of_program


@triton.jit
def count_of(expert, ids_P, num_pairs, TILE: tl.constexpr):
    """Returns how many pairs chose `expert`."""
    hits = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, num_pairs, TILE, num_stages=1):
        pair = start + tl.arange(0, TILE)
        hits += (tl.load(ids_P + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
    return tl.sum(hits, 0)


@triton.jit
def pairs_of(expert, first, ids_P, num_pairs, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Returns ROWS pairs of those that chose `expert`, in rising order, from number `first` on; 0
    where there are no more."""
    number = first + tl.arange(0, ROWS)
    found = tl.zeros([ROWS], tl.int32)
    before = expert * 0
    for start in tl.range(0, num_pairs, TILE, num_stages=1):
        pair = start + tl.arange(0, TILE)
        is_mine = tl.load(ids_P + pair, mask=pair < num_pairs, other=-1) == expert
        rank = before + tl.cumsum(is_mine.to(tl.int32), 0)  # from 1 on, where it is mine
        is_it = is_mine[None, :] & (rank[None, :] == number[:, None] + 1)
        found += tl.sum(tl.where(is_it, pair[None, :], 0), 1)
        before += tl.sum(is_mine.to(tl.int32), 0)
    return found


@triton.jit
def work_of_program(
    blocks_3B,
    num_blocks,
    num_columns,
    num_tokens,
    ROWS_FROM: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Returns this program's expert (-1: nothing is to do), which part of the shared expert it has
    instead (-1: none), its column block, and in the order the first place and the end of its block:
    of pairs (`sort_pairs`), or of the shared expert's tokens, whose blocks follow those of pairs.
    """
    part = -1
    if ROWS_FROM == "order":
        block, column = tile_of_program(num_blocks, num_columns, GROUP)
        beyond = tl.program_id(0) - num_blocks * num_columns
        is_routed = beyond < 0
        at = blocks_3B + block
        expert = tl.load(at, mask=is_routed, other=-1)
        first = tl.load(at + num_blocks, mask=is_routed, other=0)
        end = tl.load(at + 2 * num_blocks, mask=is_routed, other=0)
        if SHARED > 0 and beyond >= 0:
            column = beyond % num_columns
            part = beyond // num_columns % SHARED
            first = beyond // num_columns // SHARED * ROWS
            end = tl.minimum(first + ROWS, num_tokens)
    else:
        owner = tl.program_id(0) // num_columns - SHARED
        expert = tl.maximum(owner, -1)
        column = tl.program_id(0) % num_columns
        first = 0
        end = 0
        if SHARED > 0 and owner < 0:
            part = owner + SHARED
    return expert, part, column, first, end


@triton.jit
def rows_at(
    first,
    end,
    expert,
    ids_P,
    order_P,
    num_pairs,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns ROWS pairs of an expert from number `first` on, their tokens, their rows in hidden
    and in parts, and which of them are some: those before `end`. A number is a place in the order,
    or counts the expert's own pairs."""
    number = first + tl.arange(0, ROWS)
    is_row = number < end
    if ROWS_FROM == "order":
        pair = tl.load(order_P + number, mask=is_row, other=0)
        row = number
        part = pair // TOP_K * SHARED + pair
    else:
        pair = pairs_of(expert, first, ids_P, num_pairs, ROWS, TILE)
        row = pair // TOP_K * SHARED + pair
        part = row
    return pair, pair // TOP_K, row, part, is_row


@triton.jit
def rows_of_shared(
    part,
    first,
    num_tokens,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Returns the same of ROWS tokens from `first` on and a part of the shared expert, whose rows
    are all tokens; in hidden they follow those of ordered pairs."""
    token = first + tl.arange(0, ROWS)
    place = token * (TOP_K + SHARED) + TOP_K + part
    row = place
    if ROWS_FROM == "order":
        row = (TOP_K + part) * num_tokens + token
    return token, token, row, place, token < num_tokens
