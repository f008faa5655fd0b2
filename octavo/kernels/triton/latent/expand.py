"""Latent attention of prompts: keys and values of each head, multiplied out a range at a time.

Called by choose.py for sequences with many queries, and for all with several where a plan says so:
what groups of them share is then multiplied out once a group, and what each has of its own after
it. Which sequences have many queries is found on the device; the host knows how many there are at
most, and how long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.facts import EXPANDED_TOKENS
from octavo.kernels.inputs import AttentionBatch, LatentOp
from octavo.kernels.triton.attention.device_plan import SharedPrompts, plan_of
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.latent.tiles import Chunks, expanded_chunks
from octavo.kernels.triton.latent.unpack import Gathered, unpacked_latents
from octavo.kernels.triton.launching.chip import cdiv

STEP = 64
"""Ranges of keys are multiples of this."""


class KeyRange(NamedTuple):
    """Keys that lie side by side, and who attends them."""

    keys: Gathered
    chunks: Chunks


def expanded_attention(
    q_parts: tuple[Tensor, Tensor],
    both_NR: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THV: Tensor,
    *,
    short: int,
) -> None:
    """Writes the rows of `out` whose sequences have more than `short` queries.

    q_parts: [T, H, nope], and [T, H, rope], rotated, and mixed as the plane's rotated columns are;
    rows may be apart. both [H * (nope + value), rank] makes keys and values.
    """
    num_tokens, num_heads, _ = out_THV.shape
    ranges = _ranges(batch, num_tokens, plane.block_size, short)
    has_several = len(ranges) > 1
    lse_TH = torch.empty(num_tokens, num_heads, device=out_THV.device)
    if has_several:
        lse_TH.fill_(-math.inf)  # Nothing was attended before the first.
    for keys, chunks in ranges:
        latents_NC = unpacked_latents(plane, batch.block_table, keys, both_NR.dtype)
        both_NHD = (latents_NC[:, : op.rank] @ both_NR.T).unflatten(1, (num_heads, -1))
        of_heads = both_NHD[..., : op.nope_size], both_NHD[..., op.nope_size :]
        expanded_chunks(
            *(q_parts, plane, *of_heads, latents_NC[:, op.rank :], chunks, op.scale),
            *(out_THV, lse_TH, keys.positions),
            has_before=has_several,
        )


def _ranges(batch: AttentionBatch, num_tokens: int, block_size: int, short: int) -> list[KeyRange]:
    """Returns ranges of at most EXPANDED_TOKENS keys that hold all keys of long chunks, the same
    for all layers of a step."""
    plan, key = plan_of(batch), (num_tokens, block_size, short)
    known = plan.long.get(key)
    if known is None:
        shared = () if plan.prompts is None else _shared_ranges(batch, plan.prompts)
        known = plan.long[key] = [*shared, *_own_ranges(batch, num_tokens, block_size, short)]
    assert isinstance(known, list)
    return known


def _own_ranges(
    batch: AttentionBatch, num_tokens: int, block_size: int, short: int
) -> Iterator[KeyRange]:
    """Yields the ranges that hold what long chunks see, but for what groups attend for them."""
    num_sequences, plan = len(batch.seq_lens_S), plan_of(batch)
    most = min(num_sequences, num_tokens // (short + 1))
    if most == 0 or plan.num_long_keys == 0:
        return
    capacity = batch.block_table.shape[1] * block_size
    longest = capacity if plan.max_seq_len is None else min(plan.max_seq_len, capacity)
    lows_S = torch.zeros_like(batch.seq_lens_S) if plan.prompts is None else plan.prompts.low_S
    is_long_S = batch.query_starts.diff() > short
    places = torch.arange(1, most + 1, dtype=torch.int32, device=is_long_S.device)
    which = torch.searchsorted(is_long_S.cumsum(0, dtype=torch.int32), places, out_int32=True)
    which = which.where(which < num_sequences, -1)
    own_S = (batch.seq_lens_S - lows_S).where(is_long_S, 0)
    total = plan.num_long_keys
    longest = longest if total is None else min(longest, total)
    for first, size, num_rows in _cut(longest, most, total):
        starts_S = _starts(own_S, first, size)
        yield KeyRange(
            keys=Gathered(
                which=which,
                starts_S=starts_S,
                lows_S=lows_S,
                ends_S=batch.seq_lens_S,
                num_rows=num_rows,
                positions=(first, first + size),
            ),
            chunks=Chunks(
                query_starts=batch.query_starts,
                seq_lens=batch.seq_lens_S,
                lows=lows_S,
                ends=batch.seq_lens_S,
                dense_starts=starts_S,
                short=short,
            ),
        )


def _shared_ranges(batch: AttentionBatch, prompts: SharedPrompts) -> Iterator[KeyRange]:
    """Yields the ranges that hold what groups share. Members that lie side by side are one sequence
    of as many queries, which come behind all that is shared."""
    if not prompts.shared_tokens:
        return
    leaders_G, groups_R = prompts.leaders_G, prompts.run_groups_R
    is_run_R, groups_R = groups_R >= 0, groups_R.clamp(min=0)
    shared_G = prompts.low_S[leaders_G]
    shared_R = shared_G[groups_R]
    lens_R = shared_R + prompts.run_starts.diff()
    longest, total = max(prompts.shared_tokens), sum(prompts.shared_tokens)
    for first, size, num_rows in _cut(longest, len(prompts.shared_tokens), total):
        starts_G = _starts(shared_G, first, size)
        starts_S = torch.zeros_like(prompts.low_S).index_put_((leaders_G,), starts_G)
        yield KeyRange(
            keys=Gathered(
                which=leaders_G,
                starts_S=starts_S,
                lows_S=torch.zeros_like(starts_S),
                ends_S=prompts.low_S,
                num_rows=num_rows,
                positions=(first, first + size),
            ),
            chunks=Chunks(
                query_starts=prompts.run_starts,
                seq_lens=lens_R,
                lows=torch.zeros_like(lens_R),
                ends=shared_R,
                dense_starts=starts_G[groups_R].where(is_run_R, -1),
                short=1,
            ),
        )


def _cut(longest: int, count: int, total: int | None) -> Iterator[tuple[int, int, int]]:
    """Yields (first position, positions, rows of all) of ranges of up to `count` sequences of up to
    `longest` keys, `total` together, so that EXPANDED_TOKENS rows hold a range."""
    size = longest
    if total is None or total > EXPANDED_TOKENS:
        size = max(STEP, min(EXPANDED_TOKENS // count // STEP, cdiv(longest, STEP)) * STEP)
        total = count * size
    for first in range(0, longest, size):
        yield first, size, total


def _starts(lens: Tensor, first: int, size: int) -> Tensor:
    """Returns the rows where sequences of `lens` keys begin, their positions [first, first + size)
    side by side."""
    seen = (lens - first).clamp_(0, size)
    return seen.cumsum(0, dtype=torch.int32) - seen
