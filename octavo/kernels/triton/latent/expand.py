"""Latent attention of prompts: keys and values of each head, multiplied out a range at a time.

Called by choose.py for sequences with many queries. Which sequences those are is found on the
device; the host knows how many there are at most, and how long.
"""

from __future__ import annotations

import math

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


def expanded_attention(
    q_THD: Tensor,
    both_NR: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THV: Tensor,
    *,
    short: int,
) -> None:
    """Writes the rows of `out` whose sequences have more than `short` queries.

    q [T, H, nope + rope], rotated, and mixed as the plane's rotated columns are; both
    [H * (nope + value), rank] makes keys and values.
    """
    num_tokens, num_heads, _ = q_THD.shape
    num_sequences = len(batch.seq_lens_S)
    most = min(num_sequences, num_tokens // (short + 1))
    if most == 0:
        return
    capacity = batch.block_table.shape[1] * plane.block_size
    bound = plan_of(batch).max_seq_len
    longest = capacity if bound is None else min(bound, capacity)
    size = max(STEP, min(EXPANDED_TOKENS // most // STEP, cdiv(longest, STEP)) * STEP)
    is_long_S = batch.query_starts.diff() > short
    order_S = is_long_S.cumsum(0, dtype=torch.int32)
    starts_S = (order_S - 1).clamp_(min=0) * size
    places = torch.arange(1, most + 1, dtype=torch.int32, device=q_THD.device)
    which = torch.searchsorted(order_S, places, out_int32=True).clamp_(max=num_sequences - 1)
    lse_TH = torch.empty(num_tokens, num_heads, device=q_THD.device)
    for first in range(0, longest, size):
        latents_NC = _latents(plane, batch, which, first, size, both_NR.dtype)
        both_NHD = (latents_NC[:, : op.rank] @ both_NR.T).unflatten(1, (num_heads, -1))
        keys, values = both_NHD[..., : op.nope_size], both_NHD[..., op.nope_size :]
        target, lse = (out_THV, lse_TH) if first == 0 else (out_THV.clone(), lse_TH.clone())
        expanded_chunks(
            *(q_THD, plane, keys, values, latents_NC[:, op.rank :], starts_S, batch, op.scale),
            *(target, lse, (first, first + size)),
            short=short,
        )
        if first:
            _merge(out_THV, lse_TH, target, lse, _long_rows(batch, is_long_S, num_tokens))


def _latents(
    plane: LatentPlane,
    batch: AttentionBatch,
    which: Tensor,
    first: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns what tokens first .. first + size of the named sequences keep, one sequence after the
    other, in `dtype`; of positions behind their ends anything."""
    if not plane.is_plain:
        return unpacked_latents(plane, batch, which, first, size, dtype)
    pages_BPC, block_size = plane.numbers, plane.block_size
    positions = torch.arange(first, first + size, device=pages_BPC.device)
    columns = (positions // block_size).clamp_(max=batch.block_table.shape[1] - 1)
    blocks = batch.block_table[which][:, columns]
    is_there = positions < batch.seq_lens_S[which].unsqueeze(1)
    blocks = blocks.where(is_there, 0).long()
    return pages_BPC[blocks, positions % block_size].flatten(0, 1).to(dtype)


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
