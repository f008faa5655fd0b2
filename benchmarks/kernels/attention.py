"""Times paged attention, shared prefixes and RoPE on one GPU, beside their floors.

python benchmarks/kernels/attention.py [check] [check_shared] [check_hopper] [decode] [prefill]
    [hopper] [rope] [shared]

Floor: bytes read and written over 3.0 TB/s, or operations over 780 TFLOP/s, whichever is longer
(measured ceilings of an H100 SXM). `check` compares with float64 first. `hopper` times the
portable kernels beside those of attention_hopper.py, which `check_hopper` checks in processes
of their own, as they may hang. splits.py times its parts.
"""

# ruff: noqa: B023 (every closure is called before its loop goes on)
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from time import perf_counter
from unittest.mock import patch

import numpy as np
import torch
from attention_cases import (
    BLOCK,
    batch_of,
    exact,
    make_batch,
    make_layers,
    norm_error,
    op_of,
    poison,
    same_bits,
    tiles_of,
)
from hopper_checks import check_hopper
from triton.testing import do_bench

from octavo.kernels.inputs import AttentionBatch, QKNorm, RopeTable
from octavo.kernels.triton.attention.choose import (
    SHORT_QUERIES,
    attention,
    prefill_attention,
    short_attention,
    tiles_attention,
)
from octavo.kernels.triton.attention.decode import decode_attention
from octavo.kernels.triton.attention.device_plan import DevicePlan
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention
from octavo.kernels.triton.attention.write import rope_and_cache
from octavo.kernels.triton.launching.tickets import make_tickets

BYTES_PER_SECOND, FLOPS_PER_SECOND = 3.0e12, 780e12
MODELS = {"qwen3-30b": (32, 4, 128), "qwen1.5-moe": (16, 16, 128)}


EDGES = [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4095, 4097, 5000]


def check_case(case: tuple[int, int, int, str, str, int | None]) -> str:
    """Random lengths around every edge, unused slots NaN; decode, mixed, deterministic, alone."""
    H, K, D, q_dtype, kv_dtype, window = case
    torch.manual_seed(H * 1000 + D)
    lens = EDGES
    num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
    worst, notes = 0.0, []
    for query_lens in ([1] * len(lens), [min(n, 1 + 37 * i % 300) for i, n in enumerate(lens)]):
        layer = make_layers(num_blocks, 2, K, D, getattr(torch, kv_dtype))[1]
        batch = make_batch(lens, query_lens, num_blocks)
        poison(layer, batch)
        q = torch.randn(sum(query_lens), H, D, device="cuda").to(getattr(torch, q_dtype))
        expected = exact(q, layer, batch, window)
        op = op_of(q, layer, window)
        found = attention(q, op, layer, batch)
        worst = max(worst, norm_error(found, expected))
        strict = attention(q, op, layer, batch, is_deterministic=True)
        worst = max(worst, norm_error(strict, expected))
        starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
        for s in (3, 8, 13):
            alone = AttentionBatch(
                positions_T=batch.positions_T[starts[s] : starts[s + 1]],
                slot_mapping_T=batch.slot_mapping_T[starts[s] : starts[s + 1]],
                query_starts=batch.query_starts[s : s + 2] - starts[s],
                seq_lens_S=batch.seq_lens_S[s : s + 1],
                block_table=batch.block_table[s : s + 1],
            )
            rows = slice(starts[s], starts[s + 1])
            one = attention(q[rows], op, layer, alone)
            if not same_bits(one, found[rows], query_lens[s]):
                notes.append(f"batch changes bits of {lens[s]}/{query_lens[s]}")
            last = slice(starts[s + 1] - 1, starts[s + 1])
            tail = AttentionBatch(
                positions_T=batch.positions_T[last],
                slot_mapping_T=batch.slot_mapping_T[last],
                query_starts=batch.query_starts[:2].clamp(max=1),
                seq_lens_S=batch.seq_lens_S[s : s + 1],
                block_table=batch.block_table[s : s + 1],
            )
            single = attention(q[last], op, layer, tail)
            if not torch.equal(single, strict[last]):
                notes.append(f"deterministic differs from decode at {lens[s]}")
            if query_lens[s] > 70:
                rest = slice(starts[s + 1] - 70, starts[s + 1])
                chunk = AttentionBatch(
                    positions_T=batch.positions_T[rest],
                    slot_mapping_T=batch.slot_mapping_T[rest],
                    query_starts=batch.query_starts[:2].clamp(max=1) * 70,
                    seq_lens_S=batch.seq_lens_S[s : s + 1],
                    block_table=batch.block_table[s : s + 1],
                )
                if not torch.equal(attention(q[rest], op, layer, chunk), found[rest]):
                    notes.append(f"chunk changes bits of {lens[s]}")
    limit = 1e-5 if q_dtype == "float32" else 1e-2
    verdict = "ok" if worst < limit and not notes else "WRONG"
    return f"{verdict} {case} error {worst:.1e} {'; '.join(sorted(set(notes)))}"


def check() -> None:
    bf16, f16, f32 = "bfloat16", "float16", "float32"
    cases = [(8 * g, 8, d, bf16, bf16, None) for d, g in ((64, 1), (128, 1), (128, 16), (128, 8))]
    cases += [(6, 2, d, bf16, bf16, w) for d, w in ((80, None), (96, 70), (192, None), (256, 300))]
    cases += [(10, 2, 128, f16, f16, 1), (6, 2, 80, f32, f32, 100), (4, 2, 128, f32, bf16, None)]
    cases += [
        (4, 2, 256, f32, f32, None),
        (8, 2, 64, bf16, f32, None),
        (8, 1, 128, bf16, bf16, 1500),
    ]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for line in pool.map(check_case, cases):
            print(line, flush=True)


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Milliseconds a call, replaying all of `calls` (on different memory) as one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def line(name: str, floor_ms: float, ms: float, extra: str = "") -> None:
    us, floor_us = ms * 1e3, floor_ms * 1e3
    print(f"| {name} | {floor_us:.1f} | {us:.1f} | {us / floor_us:.2f} | {extra} |", flush=True)


def decode_layers(batch_size: int, context: int, K: int, D: int) -> tuple[int, int]:
    """Returns (blocks, layers) such that a pass over all layers is larger than the L2 cache."""
    blocks = batch_size * -(-context // BLOCK) + 8
    one = blocks * 2 * BLOCK * K * D * 2
    return blocks, max(2, min(48, -(-(1 << 28) // one)))


def decode() -> None:
    sizes = [(b, c) for c in (512, 2048, 8192, 32768) for b in (1, 4, 16, 32, 64)]
    sizes = [(b, c) for b, c in sizes if b * c <= 64 * 16384]
    for model, (H, K, D) in MODELS.items():
        for batch_size, context in sizes:
            blocks, layers = decode_layers(batch_size, context, K, D)
            kv = make_layers(blocks, layers, K, D, torch.bfloat16)
            batch = make_batch([context] * batch_size, [1] * batch_size, blocks)
            q = torch.randn(batch_size, H, D, device="cuda").bfloat16()
            out = torch.empty_like(q)
            calls = [
                lambda layer=layer: decode_attention(
                    q, op_of(q, layer), layer, batch, out, max_seq_len=context
                )
                for layer in kv
            ]
            moved = batch_size * (context * K * D * 4 + 2 * H * D * 2)
            floor = moved / BYTES_PER_SECOND * 1e3
            ms = graph_ms(calls)
            extra = f"{moved / ms / 1e9:.2f} TB/s"
            line(f"decode {model} batch {batch_size} context {context}", floor, ms, extra)
            del kv, calls


def prefill() -> None:
    for model, (H, K, D) in MODELS.items():
        for fresh, cached in ((8192, 0), (32768, 0), (4096, 28672), (64, 32768), (512, 7680)):
            total = fresh + cached
            layer = make_layers(total // BLOCK + 8, 2, K, D, torch.bfloat16)[1]
            batch = make_batch([total], [fresh], total // BLOCK + 8)
            q = torch.randn(fresh, H, D, device="cuda").bfloat16()
            out = torch.empty_like(q)
            few = fresh * (fresh <= SHORT_QUERIES)
            bounded = replace(batch, plan=DevicePlan(max_query_len=fresh, num_short_tokens=few))
            run = lambda: tiles_attention(q, op_of(q, layer), layer, bounded, out)
            flops = 4 * H * D * (fresh * cached + fresh * (fresh + 1) / 2)
            moved = total * K * D * 4 + 4 * q.numel()
            floor = max(flops / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND) * 1e3
            ms = do_bench(run, warmup=10, rep=60, return_mode="median")
            extra = f"{flops / ms / 1e9:.0f} TFLOP/s"
            line(f"prefill {model} {fresh} after {cached}", floor, ms, extra)


def rope() -> None:
    for model, (H, K, D) in MODELS.items():
        for tokens in (1, 32, 256, 8192):
            layers = max(2, 8 if tokens == 8192 else 48)
            kv = make_layers(tokens // BLOCK + 8, layers, K, D, torch.bfloat16)
            batch = make_batch([tokens], [tokens], tokens // BLOCK + 8)
            table = RopeTable(
                cos=torch.randn(40960, D // 2, device="cuda"),
                sin=torch.randn(40960, D // 2, device="cuda"),
                rotary_dim=D,
            )
            w = torch.randn(D, device="cuda").bfloat16()
            norm = QKNorm(query=w, key=w, eps=1e-6, per_head=True) if K < H else None
            columns = (H + 2 * K) * D
            inputs = [torch.randn(tokens, columns, device="cuda").bfloat16() for _ in kv]
            calls = [
                lambda layer=layer, x=x: rope_and_cache(x, H, table, norm, layer, batch)
                for layer, x in zip(kv, inputs, strict=True)
            ]
            floor = tokens * columns * 4 / BYTES_PER_SECOND * 1e3
            line(f"rope_and_cache {model} T {tokens}", floor, graph_ms(calls))


def check_shared() -> None:
    """Two groups and loners, shared and private parts of many lengths, against float64."""
    torch.manual_seed(0)
    for H, K, D, window in ((32, 4, 128, None), (4, 4, 64, None), (6, 2, 80, 700)):
        lens, query_lens = [1700, 1025, 1024, 3000, 500, 77, 1040, 900], [1] * 6 + [100, 1]
        num_blocks = sum(-(-n // BLOCK) for n in lens) + 8
        layer = make_layers(num_blocks, 2, K, D, torch.bfloat16)[1]
        batch = make_batch(lens, query_lens, num_blocks)
        batch.block_table[:4, :64] = batch.block_table[0, :64]
        batch.block_table[5:6, :3] = batch.block_table[4, :3]
        table = batch.block_table.cpu().numpy()
        plan = plan_shared_prefix(
            table, np.array(lens), np.array(query_lens), tiles_of(H, K), min_blocks=1
        )
        q = torch.randn(sum(query_lens), H, D, device="cuda").bfloat16()
        found = shared_prefix_attention(
            *(q, op_of(q, layer, window), layer, batch, plan.to_device(q.device))
        )
        error = norm_error(found, exact(q, layer, batch, window))
        print("ok" if error < 1e-2 else "WRONG", "shared", (H, K, D, window), f"{error:.1e}")


def shared() -> None:
    for model, (H, K, D) in MODELS.items():
        for prefix, tail, size in ((32768, 96, 32), (2048, 256, 32), (32768, 96, 8)):
            total = prefix + tail
            blocks, tail_blocks = prefix // BLOCK, -(-tail // BLOCK)
            num_blocks = blocks + size * tail_blocks + 8
            kv = make_layers(num_blocks, 2 if K == 16 else 4, K, D, torch.bfloat16)
            batch = make_batch([total], [1], num_blocks)
            first = batch.block_table[:1, :blocks]
            rest = torch.arange(size * tail_blocks).view(size, -1).to(first)
            order = torch.cat((first.expand(size, -1), rest), 1)
            batch = AttentionBatch(
                positions_T=torch.full((size,), total - 1, dtype=torch.int32, device="cuda"),
                slot_mapping_T=torch.zeros(size, dtype=torch.int64, device="cuda"),
                query_starts=torch.arange(size + 1, dtype=torch.int32, device="cuda"),
                seq_lens_S=torch.full((size,), total, dtype=torch.int32, device="cuda"),
                block_table=order.contiguous(),
            )
            plan = plan_shared_prefix(
                order.cpu().numpy(),
                np.full(size, total),
                np.ones(size, np.int64),
                tiles_of(H, K),
            ).to_device(torch.device("cuda"))
            q = torch.randn(size, H, D, device="cuda").bfloat16()
            moved = (prefix + size * tail) * K * D * 4 + 4 * q.numel()
            floor = max(moved / BYTES_PER_SECOND, 4 * H * D * size * total / FLOPS_PER_SECOND)
            name = f"{model} {size} x ({prefix} shared + {tail})"
            out = torch.empty_like(q)
            apart = graph_ms(
                [
                    lambda layer=layer: decode_attention(
                        q, op_of(q, layer), layer, batch, out, max_seq_len=total
                    )
                    for layer in kv
                ]
            )
            ms = graph_ms(
                [
                    lambda layer=layer: shared_prefix_attention(
                        q, op_of(q, layer), layer, batch, plan
                    )
                    for layer in kv
                ]
            )
            line(f"shared {name}", floor * 1e3, ms, f"without the plan {apart * 1e3:.0f} us")


def compare(
    name: str,
    flops: float,
    before: list[Callable[[], object]],
    now: list[Callable[[], object]],
) -> None:
    """Prints the median time of both as graphs, in which the host takes no part."""
    found = []
    for calls in (before, now):
        try:
            ms = graph_ms(calls, repeats=3 if flops > 1e12 else 10)
            found.append(f"{ms * 1e3:.0f} us {flops / ms / 1e9:.0f} TFLOP/s")
        except Exception as error:
            found.append(f"FAILED {str(error)[:80]!r}")
    print(f"| {name} | {' | '.join(found)} |", flush=True)


def host_us(run: Callable[[], object]) -> float:
    """Microseconds of the host for one call."""
    run()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(50):
        run()
    elapsed = perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 50 * 1e6


def hopper() -> None:
    print("| case | before | now |")
    shapes = [(str(n), [n], [n], 0) for n in (32768, 8192, 2048, 512)]
    shapes += [("4 x 2048", [2048] * 4, [2048] * 4, 0), ("4096 after 28672", [32768], [4096], 0)]
    shapes += [("64 after 32768", [32832], [64], 0), ("16 after 32768", [32784], [16], 0)]
    shapes += [("64 after 4096", [4160], [64], 0)]
    shapes += [("32 x 64 after 32768 shared", [32832] * 32, [64] * 32, 2048)]
    for model, (H, K, D) in MODELS.items():
        for name, lens, query_lens, shared_blocks in shapes:
            num_blocks = (sum(lens) if not shared_blocks else lens[0] + 32 * 64) // BLOCK + 8
            layers = make_layers(num_blocks, 3, K, D, torch.bfloat16)
            batch = batch_of(lens, query_lens, shared_blocks, num_blocks)
            most = max(query_lens)
            few = sum(query_lens) if most <= SHORT_QUERIES else 0
            # The short plan is made in the graphs' warm-up: an engine plans once a step.
            batch = replace(batch, plan=DevicePlan(max_query_len=most, num_short_tokens=few))
            q = torch.randn(sum(query_lens), H, D, device="cuda").bfloat16()
            out = torch.empty_like(q)
            pairs = sum(f * (2 * n - f + 1) / 2 for n, f in zip(lens, query_lens, strict=True))
            cases = [(q, op_of(q, layer), layer, batch, out) for layer in layers]
            before = [partial(prefill_attention, *case) for case in cases]
            if few:
                before = [partial(short_attention, *case, few) for case in cases]
            now = [partial(tiles_attention, *case) for case in cases]
            compare(f"{model} {name}", 4 * H * D * pairs, before, now)
        print(f"host: {host_us(now[0]):.0f} us for {name}")
        for size, prefix in ((32, 32768), (8, 32768), (32, 4096)):
            compare_shared(f"{model} {size} x ({prefix} shared + 96)", H, K, D, size, prefix)


def compare_shared(name: str, H: int, K: int, D: int, size: int, prefix: int) -> None:
    total, blocks = prefix + 96, prefix // BLOCK
    num_blocks = blocks + size * 6 + 8
    layers = make_layers(num_blocks, 3, K, D, torch.bfloat16)
    batch = batch_of([total] * size, [1] * size, blocks, num_blocks)
    batch = replace(batch, plan=DevicePlan(max_query_len=1, num_short_tokens=0))
    table = batch.block_table.cpu().numpy()
    tiles = tiles_of(H, K)
    plan = plan_shared_prefix(table, np.full(size, total), np.ones(size, np.int64), tiles)
    q = torch.randn(size, H, D, device="cuda").bfloat16()
    tickets, on_device = make_tickets(q.device), plan.to_device(q.device)
    now = [
        partial(shared_prefix_attention, q, op_of(q, layer), layer, batch, on_device, tickets)
        for layer in layers
    ]

    def portable(run: Callable[[], object]) -> None:
        with patch("octavo.kernels.triton.attention.shared.fits_hopper", return_value=False):
            run()

    before = [partial(portable, run) for run in now]
    compare(name, 4 * H * D * size * total, before, now)


def main() -> None:
    jobs = {"check": check, "check_shared": check_shared, "decode": decode, "prefill": prefill}
    jobs |= {"rope": rope, "shared": shared, "check_hopper": check_hopper, "hopper": hopper}
    print(torch.__version__, torch.cuda.get_device_name())
    for name in sys.argv[1:] or list(jobs):
        print(f"== {name}: op, floor us, measured us, ratio")
        jobs[name]()


if __name__ == "__main__":
    main()
