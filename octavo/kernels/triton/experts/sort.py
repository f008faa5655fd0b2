"""Pairs sorted by expert, into blocks of one expert each, in one or two launches.

Called by `moe.py` where tokens are many. Never waits for the device.

A pair is (token, choice): number token * top_k + choice, P of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn

MAX_CHUNKS = 128
SORT_WARPS = 4
UNCOUNTED_PAIRS = 1024
"""Up to so many, a histogram of all pairs in every program is cheaper than a second launch."""
BLOCKS_TILE = 32


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    ids_P,
    counts_CE,
    num_tokens,
    size,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """counts[c, e] = pairs of chunk c (`size` of them) that chose expert e."""
    wait_turn(OVERLAP)
    num_pairs = num_tokens * TOP_K  # known to be a multiple of TOP_K: loads stay wide
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    hits = tl.zeros([TILE, EXPERTS], tl.int32)
    for start in range(chunk * size, chunk * size + size, TILE):
        pair = start + tl.arange(0, TILE)
        ids = tl.load(ids_P + pair, mask=pair < num_pairs, other=-1)
        hits += (ids[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts_CE + chunk * EXPERTS + expert, tl.sum(hits, 0))


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_blocks"])
def order_kernel(
    ids_P,
    counts_CE,
    order_P,
    places_P,
    blocks_3B,
    num_tokens,
    num_experts,
    num_chunks,
    num_blocks,
    size,
    TOP_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    COUNT_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """order = the pairs, stably sorted by expert; blocks = runs of up to BLOCK_P of one expert.

    order_P int32 [P], and its inverse places_P, -1 for pairs left out; blocks_3B int32 [3, B]: see
    `SortedPairs`. Each of C programs places its
    own chunk of `size` pairs and writes its share of the blocks; ids outside [0, E) are left out.
    PAIRS: a power of two that holds all pairs, which then every program counts itself; or 0, and
    counts_CE has the chunks' counts.
    """
    wait_turn(OVERLAP)
    num_pairs = num_tokens * TOP_K  # as above
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    if PAIRS:
        every = tl.arange(0, PAIRS)
        chosen = tl.load(ids_P + every, mask=every < num_pairs, other=-1)
        is_known = (chosen >= 0) & (chosen < num_experts)
        total = tl.histogram(chosen, EXPERTS, mask=is_known)
        before = tl.histogram(chosen, EXPERTS, mask=is_known & (every < chunk * size))
    else:
        total = tl.zeros([EXPERTS], tl.int32)
        before = tl.zeros([EXPERTS], tl.int32)
        for start in range(0, num_chunks, COUNT_ROWS):
            row = start + tl.arange(0, COUNT_ROWS)
            at = row[:, None] * EXPERTS + expert[None, :]
            counts = tl.load(counts_CE + at, mask=(row < num_chunks)[:, None], other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((row < chunk)[:, None], counts, 0), 0)
    total = tl.where(expert < num_experts, total, 0)
    first = tl.cumsum(total, 0) - total
    blocks = (total + BLOCK_P - 1) // BLOCK_P
    block_end = tl.cumsum(blocks, 0)
    block_start = block_end - blocks
    place = first + before
    lane = tl.arange(0, TILE)
    for start in range(chunk * size, chunk * size + size, TILE):
        pair = start + lane
        ids = tl.load(ids_P + pair, mask=pair < num_pairs, other=-1)
        again = tl.load(ids_P + start + lane, mask=pair < num_pairs, other=-1)
        is_equal = (ids[:, None] == again[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(is_equal.to(tl.int32), 1)
        is_expert = (ids[:, None] == expert[None, :]).to(tl.int32)
        at = rank + tl.sum(is_expert * place[None, :], 1)
        is_kept = (ids >= 0) & (ids < num_experts) & (pair < num_pairs)
        tl.store(order_P + at, pair, mask=is_kept)
        tl.store(places_P + pair, tl.where(is_kept, at, -1), mask=pair < num_pairs)
        place += tl.sum(is_expert, 0)
    for start in range(chunk * BLOCKS, num_blocks, num_chunks * BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_of = (block[:, None] >= block_start[None, :]) & (block[:, None] < block_end[None, :])
        mine = is_of.to(tl.int32)
        begin = first[None, :] + (block[:, None] - block_start[None, :]) * BLOCK_P
        begin = tl.sum(mine * begin, 1)
        end = tl.minimum(begin + BLOCK_P, tl.sum(mine * (first + total)[None, :], 1))
        owner = tl.sum(mine * (expert[None, :] + 1), 1) - 1
        end = tl.where(owner < 0, tl.sum(blocks, 0), end)
        is_block = block < num_blocks
        tl.store(blocks_3B + block, owner, mask=is_block)
        tl.store(blocks_3B + num_blocks + block, begin, mask=is_block)
        tl.store(blocks_3B + 2 * num_blocks + block, end, mask=is_block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortedPairs:
    """What dispatch learned, for the products and the combine."""

    order_P: Tensor
    """int32 [P] pairs by expert, those of an expert in rising order."""
    places_P: Tensor
    """int32 [P] where each pair is in it, or -1."""
    blocks_3B: Tensor
    """int32 [3, B]: expert, first place and end place in `order_P`. Those unused come last: -1, 0,
    and how many are used."""
    block_p: int


def max_blocks(num_pairs: int, num_experts: int, block_p: int) -> int:
    """Returns the most blocks that any routing can need: every expert may leave one unfilled."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // block_p


def sort_pairs(topk_ids: Tensor, num_experts: int, block_p: int) -> SortedPairs:
    """Sorts the pairs of `topk_ids` int32 [T, K] by expert; one or two launches, no sync."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    assert num_pairs > 0
    assert topk_ids.is_contiguous()
    assert topk_ids.dtype is torch.int32
    experts = next_power_of_2(num_experts)
    is_few = num_pairs <= UNCOUNTED_PAIRS
    tile = max(16, min(32 if is_few else 64, 8192 // experts))
    num_tiles = cdiv(num_pairs, tile)
    size = cdiv(num_tiles, MAX_CHUNKS) * tile
    num_chunks = cdiv(num_pairs, size)
    num_blocks = max_blocks(num_pairs, num_experts, block_p)
    order, places = topk_ids.new_empty(num_pairs), topk_ids.new_empty(num_pairs)
    blocks = topk_ids.new_empty((3, num_blocks))
    counts = topk_ids
    options = launch_options(topk_ids.device)
    if not is_few:
        counts = topk_ids.new_empty((num_chunks, experts))
        count_kernel[(num_chunks,)](
            topk_ids,
            counts,
            num_tokens,
            size,
            TOP_K=top_k,
            TILE=tile,
            EXPERTS=experts,
            num_warps=SORT_WARPS,
            **options,
        )
    order_kernel[(num_chunks,)](
        topk_ids,
        counts,
        order,
        places,
        blocks,
        num_tokens,
        num_experts,
        num_chunks,
        num_blocks,
        size,
        TOP_K=top_k,
        BLOCK_P=block_p,
        TILE=tile,
        EXPERTS=experts,
        COUNT_ROWS=max(1, min(32, 4096 // experts)),
        BLOCKS=BLOCKS_TILE,
        PAIRS=max(32, next_power_of_2(num_pairs)) if is_few else 0,
        num_warps=SORT_WARPS,
        **options,
    )
    return SortedPairs(order_P=order, places_P=places, blocks_3B=blocks, block_p=block_p)
