"""Times the Triton MoE layer on this GPU: a table of floors, measured times and their ratios.

    python benchmarks/kernels/experts.py [--shapes qwen3,qwen15,mixtral] [--tokens 1,32,8192]

Floor: the larger of the bytes of the experts hit over 3.0 TB/s and FLOPs over 780 TFLOP/s (both
measured on an H100). Times are medians of CUDA graph replays over several routings; bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.kernels.routing import RoutingRule
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import is_few
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.pairs import experts_of_pairs
from octavo.kernels.triton.experts.route import route
from octavo.kernels.triton.experts.shapes import experts_shape, pairs_shape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.weights import Router

SHAPES = {
    "qwen3": (2048, 128, 8, 768),
    "qwen15": (2048, 60, 4, 1408),
    "mixtral": (4096, 8, 2, 14336),
}
"""Hidden size, experts, top k, expert hidden size."""
TOKENS = "1,2,4,8,16,32,64,128,512,2048,8192"
BYTES_PER_US, FLOPS_PER_US = 3.0e6, 780e6


def replay_us(runs: list[Callable[[], object]], repeats: int = 10) -> float:
    """Returns the median microseconds of one of `runs`, all captured into one graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    return sorted(times)[len(times) // 2]


def make_experts(model: str) -> StackedExperts:
    hidden, count, _, inner = SHAPES[model]

    def normal(*sizes: int) -> Tensor:
        values = torch.empty(*sizes, device="cuda", dtype=torch.bfloat16)
        return values.normal_(std=sizes[-1] ** -0.5)

    both = normal(count, 2 * inner, hidden)
    down = normal(count, hidden, inner)
    return StackedExperts(gate_EFM=both[:, :inner], up_EFM=both[:, inner:], down_EMF=down)


def time_layer(model: str, num_tokens: int, experts: StackedExperts) -> str:
    hidden, count, top_k, inner = SHAPES[model]
    sets = 8 if num_tokens <= 64 else 4 if num_tokens <= 512 else 1
    cases, router = [], Router(weights=(), rule=RoutingRule(top_k=top_k, renormalize=True))
    for _ in range(sets):
        x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
        logits = torch.randn(num_tokens, count, device="cuda")
        counts = torch.zeros(count, dtype=torch.int32, device="cuda")
        cases.append((x, *route(logits, router, counts, None)))
    distinct = sum(len(ids.unique()) for _, _, ids in cases) / sets
    flops = num_tokens * top_k * 6 * hidden * inner
    floor = max(distinct * 6 * hidden * inner / BYTES_PER_US, flops / FLOPS_PER_US)
    shape = experts_shape(num_tokens, top_k, count, inner, can_tma=True)
    kind = "scanned" if is_few(cases[0][2]) else "sorted"
    if shape.is_direct:
        kind, pairs = "pairs", pairs_shape(hidden, inner, top_k)
        found = replay_us([lambda c=c: experts_of_pairs(*c, experts, "silu", pairs) for c in cases])
    else:
        found = replay_us([lambda c=c: grouped_experts(*c, experts, "silu", shape) for c in cases])
    parts = torch.randn(num_tokens * top_k, hidden, device="cuda").bfloat16()
    sort = 0.0
    if kind == "sorted":
        sort = replay_us([lambda c=c: sort_pairs(c[2], count, shape.block_p) for c in cases] * 4)
    merge = replay_us([lambda c=c: combine(parts, c[2], count) for c in cases] * 4)
    return (
        f"{model:8} {num_tokens:5} {kind:>13} "
        f"{floor:9.1f} {found:9.1f} {found / floor:6.3f} {flops / found / 1e6:7.0f} "
        f"{sort:6.1f} {merge:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=TOKENS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    print("shape   tokens           with  floor us  found us  ratio  TFLOP/s  sort  combine")
    for model in arguments.shapes.split(","):
        experts = make_experts(model)
        for num_tokens in map(int, arguments.tokens.split(",")):
            print(time_layer(model, num_tokens, experts), flush=True)


if __name__ == "__main__":
    main()
