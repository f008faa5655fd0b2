"""Latent attention of prompts: keys and values of each head, multiplied out a range at a time.

Called by choose.py for sequences with many queries. Which sequences those are is found on the
device; the host knows how many there are at most, and how long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, LatentOp
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.latent.tiles import expanded_chunks
from octavo.kernels.triton.latent.unpack import unpacked_latents
from octavo.kernels.triton.launching.chip import cdiv

EXPANDED_TOKENS = 16384
"""Tokens whose keys and values are there at once."""
STEP = 128
"""Ranges of keys are multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LongKeys:
    """A range of the positions of sequences with many queries, whose keys lie side by side."""

    which: Tensor
    """int32: those sequences; -1 where there are no more."""
    starts_S: Tensor
    """int32: the row of each one's first position in the range."""
    num_rows: int
    positions: tuple[int, int]


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
    lse_TH = torch.empty(num_tokens, num_heads, device=out_THV.device)
    for keys in _long_keys(batch, num_tokens, plane.block_size, short):
        latents_NC = unpacked_latents(
            *(plane, batch, keys.which, keys.starts_S, keys.num_rows, keys.positions),
            both_NR.dtype,
        )
        both_NHD = (latents_NC[:, : op.rank] @ both_NR.T).unflatten(1, (num_heads, -1))
        of_heads = both_NHD[..., : op.nope_size], both_NHD[..., op.nope_size :]
        is_first = keys.positions[0] == 0
        target, lse = (out_THV, lse_TH) if is_first else (out_THV.clone(), lse_TH.clone())
        expanded_chunks(
            *(q_parts, plane, *of_heads, latents_NC[:, op.rank :], keys.starts_S, batch, op.scale),
            *(target, lse, keys.positions),
            short=short,
        )
        if not is_first:
            is_long_S = batch.query_starts.diff() > short
            _merge(out_THV, lse_TH, target, lse, _long_rows(batch, is_long_S, num_tokens))


def _long_keys(
    batch: AttentionBatch, num_tokens: int, block_size: int, short: int
) -> list[LongKeys]:
    """Returns ranges of at most EXPANDED_TOKENS keys that hold all keys of long chunks, the same
    for all layers of a step."""
    plan, key = plan_of(batch), (num_tokens, block_size, short)
    known = plan.long.get(key)
    if known is None:
        known = plan.long[key] = _ranges(batch, num_tokens, block_size, short)
    assert isinstance(known, list)
    return known


def _ranges(batch: AttentionBatch, num_tokens: int, block_size: int, short: int) -> list[LongKeys]:
    num_sequences, plan = len(batch.seq_lens_S), plan_of(batch)
    most = min(num_sequences, num_tokens // (short + 1))
    if most == 0 or plan.num_long_keys == 0:
        return []
    capacity = batch.block_table.shape[1] * block_size
    longest = capacity if plan.max_seq_len is None else min(plan.max_seq_len, capacity)
    total, size = plan.num_long_keys, longest
    if total is None or total > EXPANDED_TOKENS:
        size = max(STEP, min(EXPANDED_TOKENS // most // STEP, cdiv(longest, STEP)) * STEP)
        total = most * size
    is_long_S = batch.query_starts.diff() > short
    places = torch.arange(1, most + 1, dtype=torch.int32, device=is_long_S.device)
    which = torch.searchsorted(is_long_S.cumsum(0, dtype=torch.int32), places, out_int32=True)
    which = which.where(which < num_sequences, -1)
    found = []
    for first in range(0, longest, size):
        seen_S = (batch.seq_lens_S - first).clamp_(0, size).where(is_long_S, 0)
        starts_S = seen_S.cumsum(0, dtype=torch.int32) - seen_S
        positions = first, first + size
        found.append(LongKeys(which=which, starts_S=starts_S, num_rows=total, positions=positions))
    return found


def _long_rows(batch: AttentionBatch, is_long_S: Tensor, num_tokens: int) -> Tensor:
    """Returns [T]: whether a token's sequence has many queries."""
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=is_long_S.device)
    sequences = torch.searchsorted(batch.query_starts[1:], tokens, right=True)
    return is_long_S[sequences.clamp_(max=len(is_long_S) - 1)]


def _merge(
    out_THV: Tensor, lse_TH: Tensor, more_THV: Tensor, more_TH: Tensor, rows: Tensor
) -> None:
    """Adds to means the means over further keys, both with their log2-sum-exp2, in place."""
    share = torch.sigmoid((more_TH - lse_TH) * math.log(2)).where(rows.unsqueeze(1), 0.0)
    mean = torch.lerp(out_THV.float(), more_THV.float(), share.unsqueeze(2))
    out_THV.copy_(mean.where(rows.view(-1, 1, 1), out_THV.float()))
    lse_TH.copy_(torch.logaddexp2(lse_TH, more_TH))
