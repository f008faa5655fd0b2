"""Keys and values of formats with scales as plain numbers again: once a step and layer, for chunks
of many queries, so that these are attended as fast as without such formats.

Called by choose.py for steps that are too large to be replayed as graphs. Which sequences have many
queries is found on the device, once a step; the host knows how many there are at most, and how
long. Values come back to their own basis, which costs less here than for the sums of all query
heads; keys stay in that of the queries that meet them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.facts import UNPACKED_BYTES
from octavo.kernels.inputs import AttentionBatch, KVLayer
from octavo.kernels.triton.attention.device_plan import DevicePlan, LongRow, plan_of
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import (
    both_planes,
    has_vector_scales,
    is_mixed,
    kv_tile,
    plane_of_head,
    vector_scales,
)
from octavo.kernels.triton.tiles.kv_write import mixed


@triton.jit
def _unpack_head(
    out, to, plane, head, page, inside, live, K: tl.constexpr, D: tl.constexpr,
    FORMAT: tl.constexpr, UNMIX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes to out + to [N] what one kv head has at `inside` [N] of pages, UNMIX: mixed back."""
    d = tl.arange(0, BLOCK_D)
    plane = plane_of_head(plane, head, D, FORMAT)
    x = kv_tile(plane, page, inside, live, tl.float32, K * D, D, FORMAT, True, BLOCK_D)
    if has_vector_scales(FORMAT):
        x = x * vector_scales(plane, page, inside, live, K, True)[:, None]
    x = mixed(x, D, UNMIX)
    at = out + (to + head * D)[:, None] + d[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@launchable
@triton.jit(do_not_specialize=["num_sequences", "num_columns"])
def _unpack_kernel(
    key_out,
    value_out,
    key,
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    which,
    seq_lens,
    block_table,
    num_sequences,
    num_columns,
    stride_table,
    stride_out,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One kv head of one page: that of column `program 0` of sequence which[program 1] goes to page
    program 1 * num_columns + program 0 of key_out and value_out [pages, P, K, D]."""
    wait_turn(OVERLAP)
    sequence = tl.load(which + tl.program_id(1))
    if sequence >= num_sequences:
        return
    first = tl.program_id(0) * P
    length = tl.load(seq_lens + sequence)
    if first >= length:
        return
    inside = tl.arange(0, BLOCK_P)
    live = (inside < P) & (first + inside < length)
    table_row = block_table + sequence.to(tl.int64) * stride_table
    page = tl.load(table_row + tl.program_id(0)).to(tl.int64) + inside * 0
    to = (tl.program_id(1).to(tl.int64) * num_columns + tl.program_id(0)) * stride_out
    to = to + inside * (K * D)
    keys, values = both_planes(
        *(key, key_scale, stride_key, stride_key_scale),
        *(value, value_scale, stride_value, stride_value_scale, KEY, VALUE),
    )
    head = tl.program_id(2)
    _unpack_head(key_out, to, keys, head, page, inside, live, K, D, KEY, False, BLOCK_D)
    _unpack_head(
        *(value_out, to, values, head, page, inside, live, K, D, VALUE, is_mixed(VALUE), BLOCK_D)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Sequences that lie side by side in a step, of which those of many queries are unpacked
    together."""

    tokens: slice
    batch: AttentionBatch | None
    """Theirs alone; None: that of the whole step, which keeps the plan that keeps this."""
    most: int
    """Of them, sequences of many queries."""
    num_columns: int
    """Pages of the longest of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedPart:
    """What `tokens` of a step attend: plain pages, named by the table of `batch`, which has the
    sequences of these tokens alone."""

    tokens: slice
    layer: KVLayer
    batch: AttentionBatch


def unpack_long_chunks(
    q_THD: Tensor, layer: KVLayer, batch: AttentionBatch, *, short: int
) -> Iterator[UnpackedPart] | None:
    """Yields plain pages, in the dtype of q, of the sequences with more than `short` queries, in
    as many parts as keep each to UNPACKED_BYTES; pages of a part are to be let go before the next.
    Returns None where one sequence alone might take more. Keys are as they are stored, mixed or
    not; values are in their own basis."""
    planes = planes_of(q_THD, layer, batch)
    page = 2 * planes.block_size * planes.num_heads * planes.head_size
    room = UNPACKED_BYTES // (page * q_THD.element_size())
    plan = plan_of(batch)
    key = "parts", short, room
    if key not in plan.long:
        plan.long[key] = _parts(batch, plan, len(q_THD), short, planes.block_size, room)
    parts = plan.long[key]
    if not parts:
        return None
    assert isinstance(parts, list)
    return (_unpacked(q_THD, layer, part, part.batch or batch, short) for part in parts)


def _parts(
    batch: AttentionBatch, plan: DevicePlan, num_tokens: int, short: int, block_size: int, room: int
) -> list[_Part] | None:
    """Returns the parts of a step whose pages are `room` at most; None if there are none."""
    rows = plan.long_rows
    if rows is None:
        most = min(len(batch.seq_lens_S), num_tokens // (short + 1))
        num_columns = batch.block_table.shape[1]
        if plan.max_seq_len is not None:
            num_columns = min(num_columns, cdiv(plan.max_seq_len, block_size))
        if not 0 < most * num_columns <= room:
            return None
        whole = slice(0, num_tokens)
        return [_Part(tokens=whole, batch=None, most=most, num_columns=num_columns)]
    groups = groups_of(rows, block_size, room)
    if groups is None:
        return None
    whole = slice(0, num_tokens), None
    parts: list[_Part] = []
    for group in groups:
        tokens, own = whole if len(groups) == 1 else _of_rows(batch, group)
        num_columns = max(cdiv(row.seq_len, block_size) for row in group)
        parts.append(_Part(tokens=tokens, batch=own, most=len(group), num_columns=num_columns))
    return parts


def groups_of(rows: Sequence[LongRow], block_size: int, room: int) -> list[list[LongRow]] | None:
    """Returns rows that follow each other, of which all take the pages of the longest; None if one
    alone takes more than `room`."""
    groups: list[list[LongRow]] = []
    widest = 0
    for row in rows:
        pages = cdiv(row.seq_len, block_size)
        if pages > room:
            return None
        widest = max(widest, pages)
        if groups and (len(groups[-1]) + 1) * widest <= room:
            groups[-1].append(row)
        else:
            groups.append([row])
            widest = pages
    return groups


def _of_rows(batch: AttentionBatch, group: Sequence[LongRow]) -> tuple[slice, AttentionBatch]:
    """Returns the tokens from the first to the last of `group`, and the batch of their sequences.

    What kernels read of it is copied: Triton builds a kernel anew for pointers that are aligned
    otherwise.
    """
    first, last = group[0], group[-1]
    rows = slice(first.index, last.index + 1)
    tokens = slice(first.first_token, last.end_token)
    starts = batch.query_starts[first.index : last.index + 2]
    own = AttentionBatch(
        positions_T=batch.positions_T[tokens],
        slot_mapping_T=batch.slot_mapping_T[tokens],
        query_starts=starts - first.first_token,
        seq_lens_S=batch.seq_lens_S[rows].clone(),
        block_table=batch.block_table[rows].clone(),
        plan=DevicePlan(max_seq_len=max(row.seq_len for row in group)),
    )
    return tokens, own


def _unpacked(
    q_THD: Tensor, layer: KVLayer, part: _Part, batch: AttentionBatch, short: int
) -> UnpackedPart:
    most, num_columns = part.most, part.num_columns
    planes, num_sequences = planes_of(q_THD, layer, batch), len(batch.seq_lens_S)
    shape = (most * num_columns, 2, planes.block_size, planes.num_heads, planes.head_size)
    pages = q_THD.new_empty(shape)
    which, table = _places(plan_of(batch), batch, short, most, num_columns)
    _unpack_kernel[(num_columns, most, planes.num_heads)](
        pages[:, 0],
        pages[:, 1],
        *planes.arguments,
        which,
        batch.seq_lens_S,
        batch.block_table,
        num_sequences,
        num_columns,
        batch.block_table.stride(0),
        pages.stride(0),
        **planes.constants,
        BLOCK_P=next_power_of_2(planes.block_size),
        BLOCK_D=max(16, next_power_of_2(planes.head_size)),
        num_warps=4,
        **launch_options(q_THD.device),
    )
    return UnpackedPart(
        tokens=part.tokens,
        layer=KVLayer(key=pages[:, 0], value=pages[:, 1]),
        batch=replace(batch, block_table=table),
    )


def _places(
    plan: DevicePlan, batch: AttentionBatch, short: int, most: int, num_columns: int
) -> tuple[Tensor, Tensor]:
    """Returns the sequences with more than `short` queries, int32 [most], beyond the last of them
    no sequence's number; and the table of the pages that theirs become. Made once a step."""
    key = "unpacked", short, most, num_columns
    known = plan.long.get(key)
    if known is None:
        device = batch.block_table.device
        order_S = (batch.query_starts.diff() > short).cumsum(0, dtype=torch.int32)
        places = torch.arange(1, most + 1, dtype=torch.int32, device=device)
        which = torch.searchsorted(order_S, places, out_int32=True)
        # As wide as the table it stands for: one binary of those who read it serves every step.
        columns = torch.arange(batch.block_table.shape[1], dtype=torch.int32, device=device)
        table = (order_S - 1).clamp_(min=0).unsqueeze(1) * num_columns + columns
        known = plan.long[key] = which, table
    assert isinstance(known, tuple)
    return known
