"""What chunks of a few queries share out: splits of their keys, planned and merged on the device.

Called by attention.py. The plan is made once a step from lengths that only the device may know (a
captured graph is replayed with others), and read by the kernels that attend and by the one that
merges. Never attends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.partials import Partials, merge_heads
from octavo.kernels.triton.attention.scores import Scores, visible_of
from octavo.kernels.triton.attention.splits import (
    PARTIALS_A_TOKEN,
    PIECE_TOKENS,
    SPLIT_STEP,
    Tiling,
)
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.visible import first_visible
from octavo.visibility import Visibility

PLAN_SEQUENCES = 512
"""Steps of up to so many sequences share one binary of the planning kernel."""
MERGE_HEADS, MERGE_SLOTS, MERGE_WARPS = 2, 8, 2
"""Heads of a row and partial results of each, of up to 128 columns, that a program of the merge
takes at a time."""
MERGE_PROGRAMS = 16
"""Of a processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Which chunks are short, and how they may be split."""

    queries: int
    """Sequences with 2 to this many queries are short."""
    splits: int
    """Of a sequence, at most."""
    shortest: int
    """Tokens of a split, at least; a multiple of SPLIT_STEP."""
    partials: int
    """Partial results of all rows (each of all heads) together, at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShortPlan:
    """How the short chunks of a step are split, on the device.

    `table` int32 [3 * (S + 1) + 1]: prefix sums over sequences of their pieces of work (a tile of
    queries and a split; heads not counted), of their places in the buffer of partial results, and
    of their rows to merge; then the tokens of a split, the same for all. A split is a range of
    positions, begins at a multiple of them, and counts from the first that a query sees.
    Query i of a sequence of n > 1 splits has places [i n, (i + 1) n) of its own.
    """

    table: Tensor
    limits: Limits


@triton.jit
def sequence_of(starts, num_sequences, index, DIVISOR: tl.constexpr):
    """Returns the last s with starts[s] // DIVISOR + s <= index, or, DIVISOR 0, starts[s] <= index
    (so that a sequence without queries is never found before the one behind it)."""
    sequence = index * 0
    beyond = sequence + num_sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        first = tl.load(starts + middle)
        if DIVISOR > 0:
            first = first // DIVISOR + middle
        if first <= index:
            sequence = middle
        else:
            beyond = middle
    return sequence


@triton.jit
def split_of(table, num_sequences):
    """Returns the tokens of a split: see `ShortPlan`."""
    return tl.load(table + 3 * (num_sequences + 1))


@triton.jit
def first_split(length, num_queries, size, reach, VISIBLE: tl.constexpr):
    """Returns the split of the first position that a query of the sequence sees."""
    return first_visible(length - num_queries, reach, VISIBLE) // size


@triton.jit
def _parts(size, length, num_queries, reach, VISIBLE: tl.constexpr):
    return tl.cdiv(length, size) - first_split(length, num_queries, size, reach, VISIBLE)


@triton.jit
def _cost(
    size,
    longest,
    tokens,
    parts,
    num_queries,
    processors,
    QUERIES: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Returns (`splits.cost`, partials) of sequences that attend `tokens` in so many parts."""
    tasks = tl.cdiv(num_queries, QUERIES) * HEAD_GROUPS
    pieces = tl.sum(tasks * parts)
    total = tl.sum(tasks.to(tl.float32) * tokens)
    partials = tl.sum(tl.where(parts > 1, num_queries * parts, 0))
    each = (tl.minimum(size, longest) + PIECE).to(tl.float32)
    waves = tl.cdiv(pieces, processors) * each
    even = (total + pieces.to(tl.float32) * PIECE) / processors + each
    return tl.minimum(waves, even) + partials.to(tl.float32) * (H / PARTIALS), partials


@launchable
@triton.jit(do_not_specialize=["num_sequences", "max_partials", "processors", "reach"])
def _plan_kernel(
    table,
    query_starts,
    seq_lens,
    num_sequences,
    max_partials,
    processors,
    reach,
    H: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    VISIBLE: tl.constexpr,
    SHORT: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    STEP: tl.constexpr,
    PIECE: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """table = `ShortPlan.table` of the sequences with 2 to SHORT queries: of 1 to SPLITS splits of
    the longest that leave no more than `max_partials`, those that cost least. One program."""
    wait_turn(OVERLAP)
    s = tl.arange(0, BLOCK_S)
    live = s < num_sequences
    start = tl.load(query_starts + s, mask=live, other=0)
    num_queries = tl.load(query_starts + s + 1, mask=live, other=0) - start
    length = tl.load(seq_lens + s, mask=live, other=0)
    # Padding of a captured graph has queries, but no tokens.
    is_short = (num_queries > 1) & (num_queries <= SHORT) & (length > 0)
    num_queries = tl.where(is_short, num_queries, 0)
    length = tl.where(is_short, length, 0)
    tokens = length - first_visible(length - num_queries, reach, VISIBLE)
    longest = tl.max(tokens)
    # One split of the whole always fits: it leaves no partial results.
    size = tl.maximum(tl.cdiv(tl.max(length), STEP) * STEP, SHORTEST)
    parts = _parts(size, length, num_queries, reach, VISIBLE)
    lowest, _ = _cost(
        size, longest, tokens, parts, num_queries, processors,
        QUERIES, HEAD_GROUPS, H, PIECE, PARTIALS,
    )  # fmt: skip
    most: tl.constexpr = SPLITS - 1 if VISIBLE > 0 else SPLITS  # What is seen may begin within.
    for count in range(2, most + 1):
        other = tl.maximum(tl.cdiv(longest, count * STEP) * STEP, SHORTEST)
        parts = _parts(other, length, num_queries, reach, VISIBLE)
        found, partials = _cost(
            other, longest, tokens, parts, num_queries, processors,
            QUERIES, HEAD_GROUPS, H, PIECE, PARTIALS,
        )  # fmt: skip
        is_better = (found < lowest) & (partials <= max_partials)
        size = tl.where(is_better, other, size)
        lowest = tl.where(is_better, found, lowest)
    parts = _parts(size, length, num_queries, reach, VISIBLE)
    is_split = parts > 1
    row = num_sequences + 1
    tl.store(table + s * row, 0, mask=s < 3)
    at = table + 1 + s
    tl.store(at, tl.cumsum(tl.cdiv(num_queries, QUERIES) * parts, 0), mask=live)
    partials = tl.where(is_split, num_queries * parts, 0)
    tl.store(at + row, tl.cumsum(partials, 0), mask=live)
    tl.store(at + 2 * row, tl.cumsum(tl.where(is_split, num_queries, 0), 0), mask=live)
    tl.store(table + 3 * row + s, size, mask=s < 1)


@launchable
@triton.jit(do_not_specialize=["num_sequences", "reach"])
def _merge_kernel(
    out,
    partial_out,
    partial_lse,
    table,
    query_starts,
    seq_lens,
    num_sequences,
    reach,
    sinks,
    H: tl.constexpr,
    D: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, h] = the row's splits weighted by 2^lse, for the rows that the plan counts to merge.
    Programs take HEADS heads of a row in turn."""
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    wait_turn(OVERLAP)
    partial_starts = table + num_sequences + 1
    merge_starts = partial_starts + num_sequences + 1
    size = split_of(table, num_sequences)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for index in tl.range(
        tl.program_id(0), tl.load(merge_starts + num_sequences) * BLOCKS, tl.num_programs(0)
    ):
        row = index // BLOCKS
        head = index % BLOCKS * HEADS + tl.arange(0, HEADS)
        sequence = sequence_of(merge_starts, num_sequences, row, 0)
        query = row - tl.load(merge_starts + sequence)
        first_row = tl.load(query_starts + sequence)
        num_queries = tl.load(query_starts + sequence + 1) - first_row
        length = tl.load(seq_lens + sequence)
        position = length - num_queries + query
        low = first_visible(position, reach, VISIBLE)
        parts = _parts(size, length, num_queries, reach, VISIBLE)
        first = low // size - first_split(length, num_queries, size, reach, VISIBLE)
        firsts = tl.load(partial_starts + sequence).to(tl.int64) * H
        firsts = firsts + (query * H + head) * parts + first
        count = position // size + 1 - low // size
        mean = merge_heads(
            *(partial_out, partial_lse, firsts, count, head < H, sinks, head),
            *(D, HAS_SINKS, HEADS * SLOTS, BLOCK_D),
        )
        at = ((first_row + query).to(tl.int64) * H + head)[:, None] * D + offs_d
        mask = (head < H)[:, None] & (offs_d < D)
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)


def short_plan_of(
    batch: AttentionBatch, tiles: Tiling, visibility: Visibility, limits: Limits
) -> ShortPlan:
    """Returns `plan_short_chunks` of the same, made once for all layers of a planned batch, which
    must not change afterwards."""
    known, key = plan_of(batch).short, (tiles, visibility, limits)
    if key not in known:
        known[key] = plan_short_chunks(batch, tiles, visibility, limits)
    return known[key]


def plan_short_chunks(
    batch: AttentionBatch, tiles: Tiling, visibility: Visibility, limits: Limits
) -> ShortPlan:
    """Returns the plan of a batch for one tiling and one visibility."""
    num_sequences = len(batch.seq_lens_S)
    assert limits.shortest % SPLIT_STEP == 0, limits
    visible, reach = visible_of(visibility)
    table = torch.empty(
        3 * (num_sequences + 1) + 1, dtype=torch.int32, device=batch.seq_lens_S.device
    )
    _plan_kernel[(1,)](
        table,
        batch.query_starts,
        batch.seq_lens_S,
        num_sequences,
        limits.partials,
        tiles.processors,
        reach,
        H=tiles.num_heads,
        HEAD_GROUPS=tiles.head_groups,
        QUERIES=tiles.queries,
        VISIBLE=visible,
        SHORT=limits.queries,
        SPLITS=limits.splits,
        SHORTEST=limits.shortest,
        STEP=SPLIT_STEP,
        PIECE=PIECE_TOKENS,
        PARTIALS=PARTIALS_A_TOKEN,
        BLOCK_S=max(PLAN_SEQUENCES, next_power_of_2(num_sequences)),
        num_warps=4,
        **launch_options(table.device),
    )
    return ShortPlan(table=table, limits=limits)


def merge_short_chunks(
    out: Tensor,
    scores: Scores,
    batch: AttentionBatch,
    plan: ShortPlan,
    partials: Partials,
    num_tokens: int,
) -> None:
    """Merges what lies in `partials` into the rows of `out` [T, H, D], all of them among the first
    `num_tokens`."""
    num_heads, head_size = out.shape[1:]
    block_d = max(16, next_power_of_2(head_size))
    programs = num_tokens * cdiv(num_heads, MERGE_HEADS)
    _merge_kernel[(min(programs, MERGE_PROGRAMS * num_processors(out.device)),)](
        out,
        partials.out,
        partials.lse,
        plan.table,
        batch.query_starts,
        batch.seq_lens_S,
        len(batch.seq_lens_S),
        *(scores.reach, scores.sinks),
        H=num_heads,
        D=head_size,
        VISIBLE=scores.visible,
        HAS_SINKS=scores.has_sinks,
        HEADS=MERGE_HEADS,
        SLOTS=max(1, MERGE_SLOTS * 128 // max(128, block_d)),
        BLOCK_D=block_d,
        num_warps=MERGE_WARPS,
        **launch_options(out.device),
    )
