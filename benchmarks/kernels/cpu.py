"""Times the ops at the demo's shapes: one JSON line each, with floors and torch beside it.

    python benchmarks/kernels/cpu.py [--backend native] [--isa avx2] [--int8] [--only linear,mlp]
        [--formats bf16,q4_1]

floor_us is the larger of bytes read over the read bandwidth, measured again before each line, and
FLOPs over the measured float32 peak of torch's matrix product. Times are the least of many runs,
since other work may share the cores (cpu_us is what a run took of them, least as well); weights
rotate through more memory than the caches hold, as in a model. Formats whose blocks 576 columns
do not fill have 768.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.cpu.library import ISAS
from octavo.kernels.cpu.native import NativeOps
from octavo.kernels.dequantize import gguf_table
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops
from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import ExpertWeights, Router, Weight
from octavo.visibility import Full

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 576, 1536, 9, 3, 64, 49152
ROUTER = Router(weights=(), rule=RoutingRule(top_k=2, renormalize=True))
TOKENS = (1, 4, 16, 128, 1024)
FORMATS = "bf16,q4_1,q4_k,q5_0,q6_k,q8_0,int4_128_f16,iq2_xs,f32"
ROTATED_BYTES = 320 << 20
PROBE = torch.ones(64 << 20)
NUMBER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine reaches with torch on all its cores."""

    bytes_per_second: float
    flops_per_second: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape. `run(i)` uses the i-th of `copies` sets of weights."""

    op: str
    shape: str
    tokens: int
    bytes: int
    flops: int
    copies: int
    run: Callable[[int], object]
    torch_run: Callable[[int], object] | None = None


def hidden_size(name: str) -> int:
    """Returns the columns of a row of the model's width in a format."""
    form = WEIGHT_FORMATS[name]
    return HIDDEN if form.is_padded or HIDDEN % form.block_size == 0 else 768


def least_seconds(
    run: Callable[[int], object],
    copies: int,
    budget: float = 0.4,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the least time of one call in about `budget` seconds, at least 5 calls."""
    least, count, end = float("inf"), 0, time.perf_counter() + budget
    while count < 5 or time.perf_counter() < end:
        start = clock()
        run(count % copies)
        least = min(least, clock() - start)
        count += 1
    return least


def read_rate(budget: float) -> float:
    """Returns the bytes that torch's threads read in a second."""
    return PROBE.nbytes / least_seconds(lambda _: PROBE.sum(), 1, budget)


def measure_machine(threads: int) -> Machine:
    torch.set_num_threads(threads)
    square = torch.ones(1024, 1024)
    product = least_seconds(lambda _: square @ square, 1, 1.0)
    return Machine(
        bytes_per_second=read_rate(1.0),
        flops_per_second=2 * 1024**3 / product,
        threads=threads,
    )


def make_weight(name: str, rows: int, cols: int) -> Weight:
    form = WEIGHT_FORMATS[name]
    if form.is_block:
        data = torch.randint(0, 50, (rows, form.row_bytes(cols)), dtype=torch.uint8)
    else:
        data = (torch.randn(rows, cols) * 0.02).to(NUMBER_DTYPES[name])
    return Weight(data=data, format=form, rows=rows, cols=cols, table=gguf_table(form))


def linear_cases(ops: Ops, name: str, tokens: int) -> Iterator[Case]:
    hidden = hidden_size(name)
    shapes = {"qkv": (576, 192, 192), "output": (576,), "vocabulary": (VOCABULARY,)}
    for label, rows in shapes.items():
        size = sum(WEIGHT_FORMATS[name].row_bytes(hidden) * n for n in rows)
        copies = max(1, ROTATED_BYTES // size)
        sets = [tuple(make_weight(name, n, hidden) for n in rows) for _ in range(copies)]
        dense = [torch.randn(sum(rows), hidden) for _ in range(min(copies, ROTATED_BYTES // size))]
        x = torch.randn(tokens, hidden)
        yield Case(
            op=f"linear {label}",
            shape=f"{hidden}x{sum(rows)}",
            tokens=tokens,
            bytes=size,
            flops=2 * tokens * hidden * sum(rows),
            copies=copies,
            run=lambda i, x=x, sets=sets: ops.linear(x, sets[i]),
            torch_run=lambda i, x=x, dense=dense: functional.linear(x, dense[i]),
        )


def mlp_cases(ops: Ops, name: str, tokens: int) -> Iterator[Case]:
    hidden = hidden_size(name)
    form = WEIGHT_FORMATS[name]
    size = 2 * form.row_bytes(hidden) * INNER + form.row_bytes(INNER) * hidden
    copies = max(4, ROTATED_BYTES // size)
    shapes = ((INNER, hidden), (INNER, hidden), (hidden, INNER))
    sets = [tuple(make_weight(name, *shape) for shape in shapes) for _ in range(copies)]
    dense = [tuple(torch.randn(shape) for shape in shapes) for _ in range(min(copies, 16))]
    x = torch.randn(tokens, hidden)

    def torch_run(i: int) -> torch.Tensor:
        gate, up, down = dense[i % len(dense)]
        return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    flops = 6 * tokens * hidden * INNER
    yield Case(
        op="gated_mlp",
        shape=f"{hidden}x{INNER}",
        tokens=tokens,
        bytes=size,
        flops=flops,
        copies=copies,
        run=lambda i: ops.gated_mlp(x, sets[i][:2], sets[i][2], "silu"),
        torch_run=torch_run,
    )
    layers = [sets[i : i + 4] for i in range(0, copies - 3, 4)]
    experts = [
        ExpertWeights(
            gate=tuple(s[0] for s in layer),
            up=tuple(s[1] for s in layer),
            down=tuple(s[2] for s in layer),
        )
        for layer in layers
    ]
    weights, ids = ops.route(torch.randn(tokens, 4), ROUTER, torch.zeros(4, dtype=torch.int64))
    yield Case(
        op="moe 4 experts top 2",
        shape=f"{hidden}x{INNER}",
        tokens=tokens,
        bytes=size * len(ids.unique()),
        flops=2 * flops,
        copies=len(experts),
        run=lambda i: ops.moe(x, weights, ids, experts[i], "silu"),
    )


def attention_cases(ops: Ops, dtype: torch.dtype) -> Iterator[Case]:
    op = AttentionOp(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        scale=0.125,
        visibility=Full(),
        rope=None,
        qk_norm=None,
    )
    for sequences, queries, seq_len in ((1, 1, 1024), (16, 1, 192), (1, 1024, 1024)):
        columns = seq_len // 16
        arena = torch.randn(30 * sequences * columns, 2, 16, KV_HEADS, HEAD_SIZE).to(dtype)
        layer = KVLayer(key=arena[:, 0], value=arena[:, 1])
        tokens, copies = sequences * queries, 30
        tables = torch.randperm(len(arena)).to(torch.int32).view(copies, sequences, columns)
        batches = [
            AttentionBatch(
                positions_T=torch.arange(seq_len - queries, seq_len, dtype=torch.int32).repeat(
                    sequences
                ),
                slot_mapping_T=torch.zeros(tokens, dtype=torch.int64),
                query_starts=torch.arange(sequences + 1, dtype=torch.int32) * queries,
                seq_lens_S=torch.full((sequences,), seq_len, dtype=torch.int32),
                block_table=table,
            )
            for table in tables
        ]
        q = torch.randn(tokens, HEADS, HEAD_SIZE)
        causal = queries > 1
        dense = [
            [torch.randn(sequences, HEADS, n, HEAD_SIZE) for n in (queries, seq_len, seq_len)]
            for _ in range(8)
        ]

        def torch_run(
            i: int, dense: list[list[torch.Tensor]] = dense, causal: bool = causal
        ) -> torch.Tensor:
            query, key, value = dense[i % len(dense)]
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

        yield Case(
            op=f"attention {sequences} x {queries} of {seq_len}",
            shape=f"{HEADS}/{KV_HEADS}x{HEAD_SIZE}",
            tokens=tokens,
            bytes=2 * sequences * seq_len * KV_HEADS * HEAD_SIZE * dtype.itemsize,
            flops=4 * tokens * HEADS * HEAD_SIZE * seq_len // (2 if causal else 1),
            copies=copies,
            run=lambda i, q=q, layer=layer, batches=batches: ops.attention(
                q, op, layer, batches[i]
            ),
            torch_run=torch_run,
        )


def small_cases(ops: Ops, tokens: int) -> Iterator[Case]:
    x, y, weight = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.ones(HIDDEN)
    logits, counts = torch.randn(tokens, 4), torch.zeros(4, dtype=torch.int64)
    runs: dict[str, Callable[[int], object]] = {
        "add_rms_norm": lambda _: ops.add_rms_norm(x, y, weight, 1e-5),
        "route": lambda _: ops.route(logits, ROUTER, counts),
    }
    for op, run in runs.items():
        bytes_read = 0 if tokens < 128 else 2 * x.nbytes
        yield Case(op=op, shape="", tokens=tokens, bytes=bytes_read, flops=0, copies=1, run=run)


def report(case: Case, name: str, ops: Ops, machine: Machine) -> None:
    torch.set_num_threads(machine.threads)
    bytes_per_second = read_rate(0.1)
    torch.set_num_threads(ops.torch_threads)
    seconds = least_seconds(case.run, case.copies)
    cpu_seconds = least_seconds(case.run, case.copies, clock=time.process_time)
    memory, compute = case.bytes / bytes_per_second, case.flops / machine.flops_per_second
    line = {
        "op": case.op,
        "backend": ops.name,
        "format": name,
        "shape": case.shape,
        "tokens": case.tokens,
        "us": round(seconds * 1e6, 1),
        "cpu_us": round(cpu_seconds * 1e6, 1),
        "floor_us": round(max(memory, compute) * 1e6, 1),
        "of_floor": round(max(memory, compute) / seconds, 2),
        "gb_per_second": round(case.bytes / seconds / 1e9, 1),
        "gflop_per_second": round(case.flops / seconds / 1e9, 1),
    }
    if case.torch_run is not None:
        torch.set_num_threads(machine.threads)
        torch_seconds = least_seconds(case.torch_run, min(case.copies, 16))
        line["torch_f32_us"] = round(torch_seconds * 1e6, 1)
        line["over_torch"] = round(torch_seconds / seconds, 2)
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--isa", choices=list(ISAS), help="of the native back end; else its best")
    parser.add_argument("--int8", action="store_true", help="activations rounded to int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--formats", default="bf16,q4_1,q4_k,q5_0,q6_k,q8_0,int4_128_f16,iq2_xs,f32"
    )
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--only", default="linear,mlp,attention,small")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    machine = measure_machine(arguments.threads)
    if arguments.isa is None:
        needs = Needs(num_threads=arguments.threads, rounds_to_int8=arguments.int8)
        ops = select_ops(arguments.backend, needs)
    else:
        ops = NativeOps(arguments.threads, arguments.isa, rounds_to_int8=arguments.int8)
    print(json.dumps({"machine": machine.__dict__, "torch": torch.__version__}), flush=True)
    only, tokens = arguments.only.split(","), [int(t) for t in arguments.tokens.split(",")]
    for count in tokens:
        for name in arguments.formats.split(","):
            if "linear" in only:
                for case in linear_cases(ops, name, count):
                    report(case, name, ops, machine)
            if "mlp" in only:
                for case in mlp_cases(ops, name, count):
                    report(case, name, ops, machine)
        if "small" in only:
            for case in small_cases(ops, count):
                report(case, "f32", ops, machine)
    if "attention" in only:
        for dtype in (torch.bfloat16, torch.float32):
            for case in attention_cases(ops, dtype):
                report(case, str(dtype).removeprefix("torch."), ops, machine)


if __name__ == "__main__":
    main()
