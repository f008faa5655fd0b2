"""Causal paged attention of a mixed step: which kernel attends which rows.

Called by the Triton back end once a layer. Never asks the device anything: grids are upper bounds,
and programs without work leave at once.

It depends on how many queries a row's sequence has in this step: one (decode.py), up to
SHORT_QUERIES (tiles, keys split so that all processors have work), or more (tiles, keys in one
run); hopper/ attends tiles where it fits, else tiles.py. Rows of the last
have the same bits in any batch and however a prompt is cut; splits of the others depend on who else
is there. `is_deterministic` sends every row the first way, in splits of its own, so that any chunk,
decode and recompute agree.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from octavo.kernels.facts import DETERMINISTIC_TOKENS, SHORT_SPLITS, SHORT_TOKENS
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.kv_codec import stored_format
from octavo.kernels.triton.attention.decode import decode_attention, seq_len_bound
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.partials import make_partials
from octavo.kernels.triton.attention.planes import is_plain
from octavo.kernels.triton.attention.scores import scores_of
from octavo.kernels.triton.attention.short_chunks import Limits, merge_short_chunks, short_plan_of
from octavo.kernels.triton.attention.splits import tiling
from octavo.kernels.triton.attention.tiles import attend_in_tiles
from octavo.kernels.triton.attention.unpack import unpack_long_chunks
from octavo.kernels.triton.launching.chip import KNOWN_TRITON, num_processors
from octavo.kernels.triton.small.mixing import mix_rows
from octavo.step import MAX_PADDED_TOKENS
from octavo.visibility import Full

if triton.__version__.startswith(KNOWN_TRITON):
    from octavo.kernels.triton.attention.hopper import kernel as hopper
else:  # Gluon is experimental: what another Triton has may not be what this kernel knows.
    hopper = None

SHORT_QUERIES = 64
"""Sequences with 2 to this many queries split their KV, to fill the chip."""
SHORTEST_SPLIT = 512


def fits_hopper(q_THD: Tensor, op: AttentionOp, layer: KVLayer) -> bool:
    """Whether hopper/ is of use here and can take a layer."""
    return hopper is not None and hopper.fits(q_THD, op, layer)


def prefill_attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    *,
    shape: tuple[int, int, int, int] | None = None,
) -> None:
    """Writes the rows of `out` [T, H * D] whose sequences have more than SHORT_QUERIES queries."""
    if len(q_THD):
        none = make_partials(q_THD[:0], 1)
        attend_in_tiles(
            q_THD,
            op,
            layer,
            batch,
            out,
            none,
            None,
            len(q_THD),
            short=SHORT_QUERIES,
            shape=shape,
        )


def short_limits(num_tokens: int) -> Limits:
    """Returns what a plan of short chunks among `num_tokens` must keep to."""
    return Limits(
        queries=SHORT_QUERIES,
        splits=SHORT_SPLITS,
        shortest=SHORTEST_SPLIT,
        partials=min(num_tokens, SHORT_TOKENS) * SHORT_SPLITS,
    )


def short_attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    num_tokens: int,
    *,
    is_hopper: bool = False,
) -> None:
    """Writes the rows of `out` whose sequences have 2 to SHORT_QUERIES queries among the first
    `num_tokens`."""
    limit = min(num_tokens, len(q_THD))
    partials = make_partials(q_THD[: min(SHORT_TOKENS, limit)], SHORT_SPLITS)
    tiles = tiling(q_THD.shape[1], layer.key.shape[2], num_processors(q_THD.device))
    plan = short_plan_of(batch, tiles, op.visibility, short_limits(limit))
    if is_hopper:
        hopper.short_chunks(q_THD, op, layer, batch, out, partials, plan, limit)
    else:
        short = plan.limits.queries
        attend_in_tiles(q_THD, op, layer, batch, out, partials, plan, limit, short=short)
    merge_short_chunks(out, scores_of(op, plan.table), batch, plan, partials, limit)


def attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    *,
    is_deterministic: bool = False,
    tickets: Tensor | None = None,
) -> Tensor:
    """Returns [T, H * D] in the dtype of q; see `Ops.attention`.

    A sequence of length 0 with one query (padding of a captured graph) gets zeros.
    """
    out = torch.empty_like(q_THD)
    bound, plan = seq_len_bound(layer, batch), plan_of(batch)
    if is_deterministic and plan.max_query_len != 1:
        _every_row_as_decode(q_THD, op, layer, batch, out, bound, tickets)
        return attended(out, layer)
    is_own = False
    if plan.max_partials != 0:
        is_own = decode_attention(
            q_THD,
            op,
            layer,
            batch,
            out,
            max_seq_len=bound,
            tickets=tickets,
            is_invariant=is_deterministic,
            unmixes=plan.max_query_len == 1,
        )
    is_own |= tiles_attention(q_THD, op, layer, batch, out)
    return out.flatten(1) if is_own else attended(out, layer)


def attended(sums_THD: Tensor, layer: KVLayer) -> Tensor:
    """Returns [T, H * D]: weighted sums of values as they are stored, back in their own basis."""
    if stored_format(layer.value).is_mixed:
        mix_rows(sums_THD)
    return sums_THD.flatten(1)


def tiles_attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
) -> bool:
    """Writes the rows of `out` whose sequences have more than one query. Returns whether the sums
    of all rows, also those that were there before, are in the values' own basis now."""
    num_tokens, plan = len(q_THD), plan_of(batch)
    longest = num_tokens if plan.max_query_len is None else plan.max_query_len
    short = num_tokens if plan.num_short_tokens is None else plan.num_short_tokens
    is_hopper = fits_hopper(q_THD, op, layer)
    if longest > 1 and short > 1:
        short_attention(q_THD, op, layer, batch, out, short, is_hopper=is_hopper)
    if longest <= SHORT_QUERIES:
        return False
    if num_tokens > MAX_PADDED_TOKENS and not is_plain(layer) and op.visibility == Full():
        parts = unpack_long_chunks(q_THD, layer, batch, short=SHORT_QUERIES)
        if parts is not None:
            # Rows of long chunks, which are written after this, get sums of values unmixed.
            attended(out[: plan.num_few_tokens], layer)
            for part in parts:
                tokens = part.tokens
                _long_chunks(q_THD[tokens], op, part.layer, part.batch, out[tokens])
                del part  # its pages, before the next part's are taken
            return True
    _long_chunks(q_THD, op, layer, batch, out)
    return False


def _long_chunks(
    q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch, out: Tensor
) -> None:
    """Writes the rows of `out` whose sequences have more than SHORT_QUERIES queries."""
    if fits_hopper(q_THD, op, layer):
        hopper.long_chunks(q_THD, op, layer, batch, out, SHORT_QUERIES)
    else:
        prefill_attention(q_THD, op, layer, batch, out)


def _every_row_as_decode(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    max_seq_len: int,
    tickets: Tensor | None,
) -> None:
    num_tokens = len(q_THD)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=q_THD.device)
    sequences = torch.searchsorted(batch.query_starts[1:], tokens, right=True, out_int32=True)
    for start in range(0, num_tokens, DETERMINISTIC_TOKENS):
        rows = slice(start, start + DETERMINISTIC_TOKENS)
        part = AttentionBatch(
            positions_T=batch.positions_T[rows],
            slot_mapping_T=batch.slot_mapping_T[rows],
            query_starts=batch.query_starts,
            seq_lens_S=batch.seq_lens_S,
            block_table=batch.block_table,
        )
        decode_attention(
            q_THD[rows],
            op,
            layer,
            part,
            out[rows],
            max_seq_len=max_seq_len,
            token_sequences=sequences[rows],
            tickets=tickets,
            is_invariant=True,
        )
