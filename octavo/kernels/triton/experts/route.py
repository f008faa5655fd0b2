"""Routing on the device: softmax and top-k in one kernel; pairs sorted by expert without a sync.

Called by `backend.py` (route) and `moe.py` (sort_pairs). Never looks at weights or activations.
A pair is (token, slot): number token * top_k + slot, P of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn

ROUTE_ROWS = 4
"""Tokens of a program; fixed, so that a row's sum has one order whatever the batch."""
MAX_CHUNKS = 128
SORT_WARPS = 4
UNCOUNTED_PAIRS = 1024
"""Up to so many, a histogram of all pairs in every program is cheaper than a second launch."""
BLOCKS_TILE = 32


@triton.jit
def route_rows(
    first_row,
    logits_TE,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    num_experts,
    row_stride,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """For the tokens first_row .. first_row + ROWS: p = softmax(logits); ids = the TOP_K largest p,
    of equal ones the lower id; weights = p[ids] (over their sum where RENORMALIZE). A NaN row takes
    experts 0, 1, ... with weight NaN.
    counts[e] += tokens that chose e. HAS_PADDING: rows from num_live[0] on get ids of -1.

    logits_TE [T, E] any float; weights_TK float32 and ids_TK int32 [T, TOP_K]; counts_E integers.
    """
    row = first_row + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    is_row = row < num_tokens
    is_in = is_row[:, None] & (expert < num_experts)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + expert[None, :]
    # Past the L1 cache: other programs of this launch may have stored them (`norm_route_kernel`).
    logits = tl.load(logits_TE + at, mask=is_in, other=-float("inf"), cache_modifier=".cg")
    logits = tl.where(is_row[:, None], logits.to(tl.float32), 0.0)
    raised = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = raised / tl.sum(raised, 1)[:, None]
    # The bits of floats that are not negative sort like them, and integers are reduced in one
    # instruction: the latency of these reductions is most of what this kernel takes.
    left = tl.where(p == p, p.to(tl.int32, bitcast=True), -1)
    left = tl.where((expert < num_experts)[None, :], left, -3)
    slots = tl.arange(0, SLOTS)
    kept = tl.zeros([ROWS, SLOTS], tl.float32)
    ids = tl.zeros([ROWS, SLOTS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(left, 1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], EXPERTS), 1)
        weight = tl.where(best >= 0, best.to(tl.float32, bitcast=True), float("nan"))
        left = tl.where(expert[None, :] == chosen[:, None], -2, left)
        kept = tl.where(slots[None, :] == slot, weight[:, None], kept)
        ids = tl.where(slots[None, :] == slot, chosen[:, None], ids)
        total += weight
    if RENORMALIZE:
        kept = kept / total[:, None]
    out = row.to(tl.int64)[:, None] * TOP_K + slots[None, :]
    is_out = is_row[:, None] & (slots < TOP_K)[None, :]
    is_live = is_out
    if HAS_PADDING:
        is_live = is_out & (row < tl.load(num_live))[:, None]
    tl.store(weights_TK + out, kept, mask=is_out)
    tl.store(ids_TK + out, tl.where(is_live, ids, -1), mask=is_out)
    # Integers: the order of the additions does not show.
    one = tl.full([ROWS, SLOTS], 1, counts_E.dtype.element_ty)
    tl.atomic_add(counts_E + ids, one, mask=is_live, sem="relaxed")


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_TE,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    num_experts,
    row_stride,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`route_rows` for ROWS tokens."""
    wait_turn(OVERLAP)
    announce(OVERLAP)
    route_rows(
        tl.program_id(0) * ROWS,
        *(logits_TE, weights_TK, ids_TK, counts_E, num_live, num_tokens, num_experts, row_stride),
        *(TOP_K, RENORMALIZE, HAS_PADDING, ROWS, EXPERTS, SLOTS),
    )


def route(
    logits_TE: Tensor, top_k: int, renormalize: bool, counts_E: Tensor, num_live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns weights float32 [T, top_k] and ids int32 [T, top_k], best first; see `Ops.route`."""
    num_tokens, num_experts = logits_TE.shape
    assert 0 < top_k <= num_experts, (top_k, num_experts)
    assert logits_TE.stride(1) == 1 or num_experts == 1
    assert counts_E.is_contiguous()
    assert len(counts_E) >= num_experts
    weights = logits_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    ids = logits_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    if num_tokens:
        route_kernel[(cdiv(num_tokens, ROUTE_ROWS),)](
            logits_TE,
            weights,
            ids,
            counts_E,
            ids if num_live is None else num_live,
            num_tokens,
            num_experts,
            logits_TE.stride(0),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            HAS_PADDING=num_live is not None,
            ROWS=ROUTE_ROWS,
            EXPERTS=next_power_of_2(num_experts),
            SLOTS=next_power_of_2(top_k),
            num_warps=4,
            **launch_options(logits_TE.device),
        )
    return weights, ids


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

    order_P int32 [P]; blocks_3B int32 [3, B]: expert (-1: the block is unused), first and end place
    in order_P. Each of C programs places its own chunk of `size` pairs and writes its share of the
    blocks; ids outside [0, E) are left out. PAIRS: a power of two that holds all pairs, which then
    every program counts itself; or 0, and counts_CE has the chunks' counts.
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
        place += tl.sum(is_expert, 0)
    for start in range(chunk * BLOCKS, num_blocks, num_chunks * BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_of = (block[:, None] >= block_start[None, :]) & (block[:, None] < block_end[None, :])
        mine = is_of.to(tl.int32)
        begin = first[None, :] + (block[:, None] - block_start[None, :]) * BLOCK_P
        begin = tl.sum(mine * begin, 1)
        end = tl.minimum(begin + BLOCK_P, tl.sum(mine * (first + total)[None, :], 1))
        owner = tl.sum(mine * (expert[None, :] + 1), 1) - 1
        is_block = block < num_blocks
        tl.store(blocks_3B + block, owner, mask=is_block)
        tl.store(blocks_3B + num_blocks + block, begin, mask=is_block)
        tl.store(blocks_3B + 2 * num_blocks + block, end, mask=is_block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortedPairs:
    """What dispatch learned, for the products and the combine."""

    order_P: Tensor
    """int32 [P] pairs by expert, those of an expert in rising order."""
    blocks_3B: Tensor
    """int32 [3, B]: expert (-1 where unused), first place and end place in `order_P`."""
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
    order = topk_ids.new_empty(num_pairs)
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
    return SortedPairs(order_P=order, blocks_3B=blocks, block_p=block_p)
