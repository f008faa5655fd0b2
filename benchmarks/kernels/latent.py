"""Times absorbed latent attention on one GPU: single queries, short chunks, shared prefixes.

python benchmarks/kernels/latent.py [check] [lone] [chunks] [shared] [--portable] [--json FILE]

Shapes are DeepSeek-V2-Lite's (16 heads, 512 + 64 columns) and V3's (128 heads). `check` compares
with float64. A floor is the bytes of the pages over 3.0 TB/s, or operations over 780 TFLOP/s,
whichever is longer. --portable keeps to the kernels that any GPU can run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from attention import BYTES_PER_SECOND, FLOPS_PER_SECOND, graph_ms
from attention_cases import make_batch, norm_error, share_blocks

from octavo.kernels.facts import SHORT_SPLITS, lone_partials
from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.device_plan import SharedPrefix
from octavo.kernels.triton.attention.partials import make_partials
from octavo.kernels.triton.attention.scores import plain_scores
from octavo.kernels.triton.attention.shared import plan_shared_prefix
from octavo.kernels.triton.attention.short_chunks import (
    Limits,
    merge_short_chunks,
    plan_short_chunks,
)
from octavo.kernels.triton.attention.splits import latent_tiling
from octavo.kernels.triton.latent import choose, decode, shared
from octavo.kernels.triton.latent.choose import FULL, SHORTEST_SPLIT
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.latent.tiles import absorbed_chunks
from octavo.kernels.triton.launching.chip import num_processors
from octavo.kernels.triton.launching.tickets import make_tickets

CUDA = torch.device("cuda", 0)
RANK, ROPE, BLOCK = 512, 64, 16
SCALE = 0.1
RESULTS: list[dict[str, object]] = []


def planes(num_blocks: int, least: int = 256 << 20) -> list[LatentPlane]:
    count = max(2, min(8, -(-least // (num_blocks * BLOCK * (RANK + ROPE) * 2))))
    arena = torch.empty(num_blocks, count, BLOCK, RANK + ROPE, dtype=torch.bfloat16, device=CUDA)
    for part in arena.split(max(1, (1 << 27) // arena[0].numel())):
        part.normal_()
    return [
        LatentPlane(
            numbers=arena[:, i], scales=arena[:, i], format="numbers", rank=RANK, rope_size=ROPE
        )
        for i in range(count)
    ]


def exact(q: torch.Tensor, plane: LatentPlane, batch: AttentionBatch) -> torch.Tensor:
    parts = []
    for s, n in enumerate(batch.seq_lens_S.tolist()):
        a, b = batch.query_starts[s : s + 2].tolist()
        blocks = batch.block_table[s, : -(-n // BLOCK)].long()
        seen = plane.numbers[blocks].flatten(0, 1)[:n].double()
        scores = torch.einsum("qhc,kc->hqk", q[a:b].double(), seen) * SCALE
        hidden = torch.arange(n, device=CUDA) > batch.positions_T[a:b].unsqueeze(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,kc->qhc", weights, seen[:, :RANK]))
    return torch.cat(parts)


def chunks(q: torch.Tensor, plane: LatentPlane, batch: AttentionBatch, out: torch.Tensor) -> None:
    count, H = q.shape[:2]
    limits = Limits(
        queries=64, splits=SHORT_SPLITS, shortest=SHORTEST_SPLIT, partials=count * SHORT_SPLITS
    )
    tiles = latent_tiling(H, num_processors(CUDA))
    plan = plan_short_chunks(batch, tiles, FULL, limits)
    partials = make_partials(out, SHORT_SPLITS)
    if choose.fits(q, plane):
        choose.short_latents(q, plane, batch, SCALE, out, partials, plan, count, tiles)
    else:
        absorbed_chunks(q, plane, batch, SCALE, out, partials, plan, count)
    merge_short_chunks(out, plain_scores(SCALE, plan.table), batch, plan, partials, count)


def lone(
    q: torch.Tensor, plane: LatentPlane, batch: AttentionBatch, out: torch.Tensor, longest: int,
    tickets: torch.Tensor,
) -> None:  # fmt: skip
    decode.latent_decode(q, plane, batch, SCALE, out, max_seq_len=longest, tickets=tickets)


def with_prefix(
    q: torch.Tensor, plane: LatentPlane, batch: AttentionBatch, out: torch.Tensor,
    prefix: SharedPrefix, tickets: torch.Tensor,
) -> None:  # fmt: skip
    rows = len(batch.seq_lens_S)
    most = prefix.max_splits + lone_partials(rows, prefix.max_tail)
    partials = make_partials(out, most, None, rows * most)
    shared.shared_latents(q, plane, batch, SCALE, prefix, partials)
    decode.latent_decode(
        *(q, plane, batch, SCALE, out),
        max_seq_len=prefix.max_tail,
        shared=(prefix.shared_tokens_S, prefix.shared_partials_S),
        partials=partials,
        tickets=tickets,
    )


def told(case: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = norm_error(found, expected)
    print("OK" if error < 1e-2 else "WRONG", case, f"{error:.1e}", flush=True)


def prefix_of(batch: AttentionBatch, lens: list[int], blocks: int, H: int) -> SharedPrefix:
    table = share_blocks(batch, blocks)
    ones = np.ones(len(lens), np.int32)
    plan = plan_shared_prefix(
        table, np.array(lens, np.int32), ones, latent_tiling(H, num_processors(CUDA))
    )
    assert plan is not None
    return plan.to_device(CUDA)


def check(heads: tuple[int, ...] = (16, 128, 20, 8)) -> None:
    tickets = make_tickets(CUDA)
    for H in heads:
        for lens in ([1, 15, 64, 65, 1023, 4097, 2600, 20000], [33], [40000], [700] * 150):
            num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
            plane = planes(num_blocks, 0)[1]
            batch = make_batch(lens, [1] * len(lens), num_blocks)
            q = torch.randn(len(lens), H, RANK + ROPE, device=CUDA).bfloat16()
            expected = exact(q, plane, batch)
            for again in range(3):
                out = torch.full((len(lens), H, RANK), math.nan, device=CUDA).bfloat16()
                lone(q, plane, batch, out, max(lens), tickets)
                told(f"lone {H} heads, {len(lens)} x {max(lens)}, {again}", out, expected)
            assert not tickets.any(), "tickets are left"
        lens, query_lens = [40, 300, 17, 5000, 64, 129, 16384], [2, 9, 17, 64, 64, 5, 33]
        num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
        plane = planes(num_blocks, 0)[1]
        batch = make_batch(lens, query_lens, num_blocks)
        q = torch.randn(sum(query_lens), H, RANK + ROPE, device=CUDA).bfloat16()
        out = torch.full((len(q), H, RANK), math.nan, device=CUDA).bfloat16()
        chunks(q, plane, batch, out)
        told(f"chunks {H} heads", out, exact(q, plane, batch))
        for lens in ([2100] * 3, [4133, 4100, 4096, 5000, 4097] * 7):
            num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
            plane = planes(num_blocks, 0)[1]
            batch = make_batch(lens, [1] * len(lens), num_blocks)
            prefix = prefix_of(batch, lens, min(lens) // BLOCK - 1, H)
            q = torch.randn(len(lens), H, RANK + ROPE, device=CUDA).bfloat16()
            out = torch.full((len(lens), H, RANK), math.nan, device=CUDA).bfloat16()
            with_prefix(q, plane, batch, out, prefix, tickets)
            told(f"shared {H} heads, {len(lens)} members", out, exact(q, plane, batch))


def report(case: str, num_bytes: float, flops: float, ms: float) -> None:
    floor, us = max(num_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND) * 1e6, ms * 1e3
    print(f"| {case} | {floor:.1f} | {us:.1f} | {us / floor:.2f} | {flops / us / 1e6:.0f} |")
    RESULTS.append({"case": case, "floor_us": floor, "us": us})


def time_of(
    case: str, lens: list[int], query_lens: list[int], H: int, shared_blocks: int = 0
) -> None:
    own = sum(-(-n // BLOCK) for n in lens)
    num_blocks = own + 8
    layers, tickets = planes(num_blocks), make_tickets(CUDA)
    batch = make_batch(lens, query_lens, num_blocks)
    q = torch.randn(sum(query_lens), H, RANK + ROPE, device=CUDA).bfloat16()
    out = torch.empty(len(q), H, RANK, device=CUDA, dtype=torch.bfloat16)
    row = 2 * (RANK + ROPE)
    pairs = sum((n - (k - 1) / 2) * k for n, k in zip(lens, query_lens, strict=True)) * H
    calls: list[Callable[[], object]]
    tokens = sum(lens)
    if shared_blocks:
        prefix = prefix_of(batch, lens, shared_blocks, H)
        tokens -= shared_blocks * BLOCK * (len(lens) - 1)
        calls = [partial(with_prefix, q, one, batch, out, prefix, tickets) for one in layers]
    elif max(query_lens) == 1:
        calls = [partial(lone, q, one, batch, out, max(lens), tickets) for one in layers]
    else:
        calls = [partial(chunks, q, one, batch, out) for one in layers]
    report(case, tokens * row, 2 * pairs * (2 * RANK + ROPE), graph_ms(calls))


def main() -> None:
    wanted, target = sys.argv[1:], None
    if "--json" in wanted:
        at = wanted.index("--json")
        target = wanted[at + 1]
        del wanted[at : at + 2]
    if "--portable" in wanted:
        wanted.remove("--portable")
        for module in (choose, decode, shared):
            module.fits = lambda *arguments: False  # type: ignore[assignment]
    wanted = wanted or ["check", "lone", "chunks", "shared"]
    print(torch.__version__, torch.cuda.get_device_name())
    print("case, floor us, measured us, ratio, TFLOP/s")
    if "check" in wanted:
        check()
    if "lone" in wanted:
        for size, context in ((1, 1150), (32, 1150), (128, 700), (32, 4096), (1, 32768)):
            time_of(f"lone {size} x {context}, 16 heads", [context] * size, [1] * size, 16)
        time_of("lone 1 x 131072, 16 heads", [131072], [1], 16)
        time_of("lone 16 x 8192, 128 heads", [8192] * 16, [1] * 16, 128)
    if "chunks" in wanted:
        time_of("64 after 32768, 16 heads", [32832], [64], 16)
        time_of("8 of 16 after 4096, 16 heads", [4112] * 8, [16] * 8, 16)
        time_of("2 after 32768, 128 heads", [32770], [2], 128)
    if "shared" in wanted:
        time_of("32 share 32768, 16 heads", [32900] * 32, [1] * 32, 16, 2048)
        time_of("8 share 8192, 16 heads", [9000] * 8, [1] * 8, 16, 512)
    if target is not None:
        device = torch.cuda.get_device_name()
        with open(target, "w", encoding="utf-8") as file:
            for one in RESULTS:
                file.write(json.dumps(one | {"device": device, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
