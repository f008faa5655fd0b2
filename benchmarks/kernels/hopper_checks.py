"""Checks attention_hopper.py against float64: chunks, shared prefixes, captured graphs.

Called by attention.py as `check_hopper`. A case runs in a process of its own: it may hang.
"""

from __future__ import annotations

import math
import traceback
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import numpy as np
import torch
from attention_cases import (
    BLOCK,
    alone,
    exact,
    make_batch,
    make_layers,
    norm_error,
    op_of,
    poison,
    same_bits,
    tiles_of,
)

from octavo.kernels.inputs import AttentionBatch, KVLayer
from octavo.kernels.triton.attention.choose import SHORT_QUERIES, attention
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention


def check_hopper_chunks(H: int, K: int, D: int, dtype: torch.dtype) -> str:
    """Long and short chunks of many lengths, in batches and alone, cut in two ways."""
    lens = [65, 1, 128, 127, 129, 1000, 64, 5000, 2049, 300, 2048, 8, 20000, 1025, 1088, 3000]
    query_lens = [65, 1, 128, 70, 129, 1000, 64, 333, 2049, 66, 65, 8, 33, 2, 64, 63]
    lens, query_lens = lens + [2500] * 12, query_lens + [64] * 12
    num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
    layer = make_layers(num_blocks, 2, K, D, dtype)[1]
    batch = make_batch(lens, query_lens, num_blocks)
    poison(layer, batch)
    q = torch.randn(sum(query_lens), H, D, device="cuda").to(dtype)
    found, expected = attention(q, op_of(q, layer), layer, batch), exact(q, layer, batch, None)
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    notes, worst = [], 0.0
    for s, n in enumerate(query_lens):
        rows = slice(starts[s], starts[s + 1])
        error = norm_error(found[rows], expected[rows])
        worst = max(worst, error)
        if error > 1e-2:
            notes.append(f"{n} of {lens[s]}: {error:.0e}")
        for last in {n, max(65, n - 1), max(65, n // 2)} if n > SHORT_QUERIES else {n}:
            some = slice(rows.stop - last, rows.stop)
            one = attention(q[some], op_of(q, layer), layer, alone(batch, s, some))
            if not same_bits(one, found[some], n):
                notes.append(f"{last} of {n} queries of {lens[s]} have other bits")
    return f"{'WRONG' if notes else 'ok'} error {worst:.1e} {'; '.join(notes[:6])}"


def check_hopper_shared(H: int, K: int, D: int, dtype: torch.dtype) -> str:
    """Groups of 150, 20 and 2 members, others beside them."""
    lens, query_lens = [1300] * 150 + [20200] * 20 + [4200] * 2 + [500, 1040], [1] * 172 + [100, 1]
    num_blocks = sum(-(-n // BLOCK) for n in lens) + 8
    layer = make_layers(num_blocks, 2, K, D, dtype)[1]
    batch = make_batch(lens, query_lens, num_blocks)
    for first, last, blocks in ((0, 150, 70), (150, 170, 1250), (170, 172, 260)):
        batch.block_table[first:last, :blocks] = batch.block_table[first, :blocks]
    poison(layer, batch)
    table = batch.block_table.cpu().numpy()
    plan = plan_shared_prefix(table, np.array(lens), np.array(query_lens), tiles_of(H, K))
    q = torch.randn(sum(query_lens), H, D, device="cuda").to(dtype)
    expected, notes = exact(q, layer, batch, None), []
    for padded in (plan, plan.padded(256)):
        on_device = padded.to_device(q.device)
        found = shared_prefix_attention(q, op_of(q, layer), layer, batch, on_device)
        for s in (0, 100, 149, 150, 169, 170, 171, 173):
            row = s if s < 172 else -1
            error = norm_error(found[row], expected[row])
            notes += [f"sequence {s}: {error:.0e}"] * (error > 1e-2)
        worst = norm_error(found, expected)
        notes += [f"all: {worst:.0e}"] * (worst > 1e-2)
    return f"{'WRONG' if notes else 'ok'} error {worst:.1e} {'; '.join(notes[:6])}"


SHORT_STEPS = [
    ([32832], [64]),
    ([4160] * 40, [64] * 40),
    ([300, 9000, 40, 5000, 0, 700, 20000, 3, 2048, 0], [1, 64, 2, 63, 0, 200, 5, 1, 64, 30]),
    ([1500] * 9, [17] * 9),
    ([700, 0], [1, 63]),
]
"""(lengths, queries) of steps: one chunk in many splits, many in one, mixed ones with padding."""


def check_hopper_short(H: int, K: int, D: int, dtype: torch.dtype) -> str:
    """Short chunks of few and of many sequences; and in one captured graph, replayed for all."""
    rows, tokens = max(len(lens) for lens, _ in SHORT_STEPS), 2700
    num_blocks = max(sum(-(-n // BLOCK) for n in lens) for lens, _ in SHORT_STEPS) + 5
    there, graph, found, notes, worst = None, torch.cuda.CUDAGraph(), None, [], 0.0
    for lens, query_lens in SHORT_STEPS:
        layer = make_layers(num_blocks, 2, K, D, dtype)[1] if there is None else there[0]
        for pages in (layer.key, layer.value):
            pages.nan_to_num_(1.0)
        batch = make_batch(lens, query_lens, num_blocks)
        poison(layer, batch)
        q = torch.randn(sum(query_lens), H, D, device="cuda").to(dtype)
        expected = exact_live(q, layer, batch)
        padded = padded_batch(batch, rows, tokens)
        if there is None:
            there = layer, padded, torch.zeros(tokens, H, D, device="cuda", dtype=dtype)
            attention(there[2], op_of(q, layer), layer, padded)
            with torch.cuda.graph(graph):
                found = attention(there[2], op_of(q, layer), layer, padded)
        for name in ("query_starts", "seq_lens_S", "block_table"):
            part = getattr(padded, name)
            getattr(there[1], name)[: len(part), ...].copy_(part)
        there[2][: len(q)] = q
        graph.replay()
        live = expected.isfinite().all(1)
        for name, result in (
            ("eager", attention(q, op_of(q, layer), layer, batch)),
            ("replayed", found[: len(q)]),
        ):
            error = norm_error(result[live], expected[live])
            worst = max(worst, error)
            notes += [f"{name} {lens[:3]}: {error:.0e}"] * (error > 1e-2)
    return f"{'WRONG' if notes else 'ok'} error {worst:.1e} {'; '.join(notes[:6])}"


def exact_live(q: torch.Tensor, layer: KVLayer, batch: AttentionBatch) -> torch.Tensor:
    """`exact`, and NaN in the rows of sequences without tokens."""
    lens, starts = batch.seq_lens_S.tolist(), batch.query_starts.tolist()
    parts = []
    for s, n in enumerate(lens):
        rows = slice(starts[s], starts[s + 1])
        if n and rows.stop > rows.start:
            parts.append(exact(q[rows], layer, alone(batch, s, rows), None))
        else:
            shape = (rows.stop - rows.start, q.shape[1] * q.shape[2])
            parts.append(torch.full(shape, math.nan, dtype=torch.float64, device="cuda"))
    return torch.cat(parts)


def padded_batch(batch: AttentionBatch, rows: int, tokens: int) -> AttentionBatch:
    """The batch as a captured step of up to `rows` sequences and `tokens` tokens has it."""
    live, columns = len(batch.seq_lens_S), 2100
    more = torch.arange(1, rows + 1 - live, device="cuda", dtype=torch.int32)
    starts = torch.cat((batch.query_starts, (batch.query_starts[-1] + more).clamp(max=tokens)))
    if len(more):
        starts[-1] = tokens
    table = torch.zeros(rows, columns, dtype=torch.int32, device="cuda")
    table[:live, : batch.block_table.shape[1]] = batch.block_table
    zeros = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    zeros[: len(batch.positions_T)] = batch.positions_T
    return AttentionBatch(
        positions_T=zeros,
        slot_mapping_T=zeros.long(),
        query_starts=starts,
        seq_lens_S=torch.nn.functional.pad(batch.seq_lens_S, (0, rows - live)),
        block_table=table,
    )


def check_hopper_case(*case: Any) -> None:
    torch.manual_seed(0)
    for form in (check_hopper_chunks, check_hopper_shared, check_hopper_short):
        try:
            line = form(*case)
        except Exception:
            line = f"FAILED {traceback.format_exc(limit=-2)}"
        print(form.__name__, case, line, flush=True)


def check_hopper() -> None:
    """Every case in a process of its own, the first two with the models' heads."""
    bf16, f16 = torch.bfloat16, torch.float16
    cases = [(32, 4, 128, bf16), (16, 16, 128, bf16), (6, 2, 128, f16), (8, 2, 64, bf16)]
    cases += [(16, 1, 128, bf16), (4, 4, 64, f16)]
    context = get_context("spawn")
    jobs = [context.Process(target=check_hopper_case, args=case) for case in cases]
    for job in jobs:
        job.start()
    end = perf_counter() + 80
    for case, job in zip(cases, jobs, strict=True):
        job.join(max(0.1, end - perf_counter()))
        if job.exitcode is None:
            job.kill()
            print(case, "HANGS or is slow")
        elif job.exitcode:
            print(case, "ended with", job.exitcode)
