"""Latent attention of a mixed step: which form and kernel attends which rows.

Called by the Triton back end once a layer. Never asks the device anything: what depends on lengths
is made on the device, within bounds that the host knows.

Sequences with one query are absorbed, and so are chunks of up to SHORT_QUERIES; more queries are
absorbed in steps that are replayed as graphs, and expanded in larger ones. Where the plan says that
it pays (attention/prompts.py), all chunks are expanded, what groups share once a group.
`is_deterministic` sends every row the way of a decode, in splits of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.facts import DETERMINISTIC_TOKENS, SHORT_SPLITS, lone_partials, short_tokens
from octavo.kernels.inputs import AttentionBatch, KVLayer, LatentOp
from octavo.kernels.triton.attention.choose import SHORT_QUERIES, SHORTEST_SPLIT
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.partials import make_partials
from octavo.kernels.triton.attention.scores import plain_scores
from octavo.kernels.triton.attention.short_chunks import (
    Limits,
    merge_short_chunks,
    short_plan_of,
)
from octavo.kernels.triton.attention.splits import latent_tiling
from octavo.kernels.triton.latent.decode import latent_decode
from octavo.kernels.triton.latent.expand import expanded_attention
from octavo.kernels.triton.latent.heads import head_product
from octavo.kernels.triton.latent.hopper.chunks import short_latents
from octavo.kernels.triton.latent.hopper.tiles import fits
from octavo.kernels.triton.latent.pages import LatentPlane, latent_plane
from octavo.kernels.triton.latent.shared import shared_latents
from octavo.kernels.triton.latent.tiles import absorbed_chunks
from octavo.kernels.triton.latent.write import write_latents
from octavo.kernels.triton.launching.chip import num_processors
from octavo.kernels.triton.small.mixing import mix_rows
from octavo.step import MAX_PADDED_TOKENS
from octavo.visibility import Full

ALL_QUERIES = 1 << 30
FULL = Full()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentViews:
    """The product of keys and values, head by head: views of its weight."""

    both_NR: Tensor
    """[H * (nope + value), rank]"""
    keys_HNR: Tensor
    values_HVR: Tensor


def latent_views(both_NR: Tensor, num_heads: int, nope_size: int) -> LatentViews:
    """Returns the views of kv_b [H * (nope + value), rank]."""
    heads = both_NR.view(num_heads, -1, both_NR.shape[1])
    return LatentViews(
        both_NR=both_NR, keys_HNR=heads[:, :nope_size], values_HVR=heads[:, nope_size:]
    )


def latent_attention(
    q_TN: Tensor,
    latent_TC: Tensor,
    op: LatentOp,
    layer: KVLayer,
    batch: AttentionBatch,
    *,
    is_deterministic: bool,
    tickets: Tensor,
) -> Tensor:
    """Returns [T, H * value]; see `Ops.latent_attention`."""
    plane, weights = latent_plane(layer, op.rank, op.rope_size), op.weights
    assert isinstance(weights, LatentViews)
    num_tokens, plan = len(q_TN), plan_of(batch)
    q_THD = q_TN.unflatten(1, (op.num_heads, -1))
    q_THC = q_TN.new_empty(num_tokens, op.num_heads, op.num_columns)
    is_expanded = num_tokens > MAX_PADDED_TOKENS or plan.prompts is not None
    is_expanded &= not is_deterministic
    short = SHORT_QUERIES if plan.prompts is None else 1
    absorbed = slice(0, num_tokens)
    if is_expanded and plan.num_few_tokens is not None:
        absorbed = slice(0, plan.num_few_tokens)
    product = {"is_invariant": is_deterministic}
    write_latents(
        *(q_THD, latent_TC, plane, op.norm_R, op.norm_eps, op.rope),
        *(batch.positions_T, batch.slot_mapping_T, q_THC, weights.keys_HNR),
        num_absorbed=absorbed.stop,
        is_interleaved=False,
        **product,
    )
    out_THV = q_TN.new_empty(num_tokens, op.num_heads, op.value_size)
    if absorbed.stop:
        out_THR = q_TN.new_empty(absorbed.stop, op.num_heads, op.rank)
        if plane.is_mixed:
            mix_rows(q_THC[absorbed, :, : op.rank])
        if is_deterministic:
            _every_row_as_decode(q_THC, op, plane, batch, out_THR, tickets)
        else:
            most = short if is_expanded else ALL_QUERIES
            _absorbed(q_THC, op, plane, batch, out_THR, most, tickets)
        if plane.is_mixed:
            mix_rows(out_THR)
        head_product(out_THR, weights.values_HVR.transpose(1, 2), out_THV[absorbed], **product)
    if is_expanded and plan.max_query_len != 1:
        parts = q_THD[..., : op.nope_size], q_THC[..., op.rank :]
        expanded_attention(*(parts, weights.both_NR, op, plane, batch, out_THV), short=short)
    return out_THV.flatten(1)


def _absorbed(
    q_THC: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THR: Tensor,
    short: int,
    tickets: Tensor,
) -> None:
    """Writes the rows of `out` whose sequences have up to `short` queries."""
    q_THC = q_THC[: len(out_THR)]
    _lone(q_THC, op, plane, batch, out_THR, tickets)
    step, count = plan_of(batch), len(q_THC)
    longest = count if step.max_query_len is None else step.max_query_len
    if step.num_short_tokens is not None and short != ALL_QUERIES:
        count = min(count, step.num_short_tokens)
    if longest > 1 and count > 1:
        _short(q_THC, op, plane, batch, out_THR, short, count)


def _lone(
    q_THC: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THR: Tensor,
    tickets: Tensor,
) -> None:
    """Writes the rows of `out` whose sequences have one query."""
    step, rows = plan_of(batch), len(batch.seq_lens_S)
    prefix, shared, partials = step.prefix, None, None
    bound = batch.block_table.shape[1] * plane.block_size
    bound = bound if step.max_seq_len is None else min(step.max_seq_len, bound)
    if prefix is not None:
        bound, shared = prefix.max_tail, (prefix.shared_tokens_S, prefix.shared_partials_S)
        most = prefix.max_splits + lone_partials(rows, bound)
        partials = make_partials(out_THR, most, None, rows * most)
        shared_latents(q_THC, plane, batch, op.scale, prefix, partials)
    elif step.max_partials == 0:
        return
    latent_decode(
        *(q_THC, plane, batch, op.scale, out_THR),
        max_seq_len=bound,
        shared=shared,
        partials=partials,
        tickets=tickets,
    )


def _short(
    q_THC: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THR: Tensor,
    short: int,
    count: int,
) -> None:
    """Writes the rows of `out` whose sequences have 2 to `short` queries, all of them among the
    first `count`."""
    rows = min(count, short_tokens(op.num_heads, op.rank))
    limits = Limits(
        queries=short, splits=SHORT_SPLITS, shortest=SHORTEST_SPLIT, partials=rows * SHORT_SPLITS
    )
    tiles = latent_tiling(op.num_heads, num_processors(q_THC.device))
    plan = short_plan_of(batch, tiles, FULL, limits)
    partials = make_partials(out_THR[:rows], SHORT_SPLITS)
    asked = (q_THC, plane, batch, op.scale, out_THR, partials, plan, count)
    if fits(q_THC, plane):
        short_latents(*asked, tiles)
    else:
        absorbed_chunks(*asked)
    merge_short_chunks(out_THR, plain_scores(op.scale, plan.table), batch, plan, partials, count)


def _every_row_as_decode(
    q_THC: Tensor,
    op: LatentOp,
    plane: LatentPlane,
    batch: AttentionBatch,
    out_THR: Tensor,
    tickets: Tensor,
) -> None:
    num_tokens = len(q_THC)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=q_THC.device)
    sequences = torch.searchsorted(batch.query_starts[1:], tokens, right=True, out_int32=True)
    sequences.clamp_(max=len(batch.seq_lens_S) - 1)
    for start in range(0, num_tokens, DETERMINISTIC_TOKENS):
        rows = slice(start, start + DETERMINISTIC_TOKENS)
        part = AttentionBatch(
            positions_T=batch.positions_T[rows],
            slot_mapping_T=batch.slot_mapping_T[rows],
            query_starts=batch.query_starts,
            seq_lens_S=batch.seq_lens_S,
            block_table=batch.block_table,
        )
        latent_decode(
            *(q_THC[rows], plane, part, op.scale, out_THR[rows]),
            max_seq_len=batch.block_table.shape[1] * plane.block_size,
            token_sequences=sequences[rows],
            tickets=tickets,
            is_invariant=True,
        )
