"""Times launch shapes of the products of a decode step on this GPU, best first for every shape.

    python benchmarks/kernels/decode.py [--parts one,experts,many,many-experts,sort]

Every time is the median of CUDA graph replays over weights that together exceed the L2 cache; the
floor is the weights' bytes over 3.0 TB/s (H100). A candidate that is not near float64 is WRONG.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from experts import BYTES_PER_US, replay_us
from torch import Tensor
from triton.runtime.errors import OutOfResources

from octavo.kernels.routing import RoutingRule
from octavo.kernels.triton.experts import route, sort
from octavo.kernels.triton.experts.dispatch import Dispatch
from octavo.kernels.triton.experts.grouped import down as grouped_down
from octavo.kernels.triton.experts.grouped import gate_up as grouped_gate_up
from octavo.kernels.triton.experts.pairs import down_and_combine, gate_up_of_pairs
from octavo.kernels.triton.experts.shapes import TileShape, experts_shape, pairs_shape
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.product.linear import product
from octavo.kernels.triton.product.matvec import matvec
from octavo.kernels.triton.product.shapes import (
    ProductShape,
    RowsShape,
    product_shape,
    rows_shape,
)
from octavo.kernels.weights import Router

DENSE = {
    "qwen3 qkv": (5120, 2048),
    "qwen3 o": (2048, 4096),
    "qwen3 router": (128, 2048),
    "qwen3 head": (151936, 2048),
    "qwen15 qkv": (6144, 2048),
    "qwen15 o": (2048, 2048),
    "qwen15 shared gate_up": (11264, 2048),
    "qwen15 shared down": (2048, 5632),
    "qwen15 router": (60, 2048),
}
"""Rows and columns of the weight."""
EXPERTS = {"qwen3": (2048, 128, 8, 768), "qwen15": (2048, 60, 4, 1408)}
"""Hidden size, experts, top k, expert hidden size."""
POOL_NUMBERS = 700_000_000
ROTATED_BYTES = 160_000_000
WRONG = 6e-3

MATVEC = (
    *((1, 2048, 4), (2, 2048, 4), (4, 2048, 4), (4, 2048, 8), (8, 2048, 8), (2, 1024, 2)),
    *((4, 1024, 4), (8, 1024, 4), (4, 512, 2), (8, 512, 4), (16, 512, 8), (2, 4096, 8)),
    *((4, 4096, 8), (1, 4096, 4), (1, 4096, 8), (2, 4096, 4)),
)
"""Rows, columns and warps of a program."""
FEW_ROWS = ((1, 2048, 2), (1, 2048, 4), (1, 2048, 8), (2, 2048, 8))
GATE_UP = ((1, 2048, 4), (2, 2048, 4), (4, 2048, 8), (4, 1024, 4), (2, 1024, 2), (8, 512, 4))
DOWN = ((2, 256, 4), (4, 256, 4), (4, 256, 8), (8, 256, 8), (4, 128, 4), (8, 128, 4))
PRODUCT = (
    *((16, 128, 2, 6), (16, 128, 4, 5), (16, 256, 4, 3), (32, 64, 4, 6), (32, 128, 4, 4)),
    *((32, 128, 8, 4), (64, 64, 4, 6), (64, 128, 4, 4)),
)
"""Rows, columns, warps and stages of a program."""
MANY_GATE_UP = (
    *((16, 128, 4, 5), (32, 64, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3), (32, 128, 4, 4)),
    *((64, 64, 4, 4), (64, 128, 8, 3)),
)
MANY_DOWN = (
    *((32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (128, 64, 4, 3)),
    *((128, 64, 8, 4), (64, 256, 8, 3)),
)

Run = Callable[[int], Tensor]
"""Runs a candidate on one of the rotated sets of weights."""


def compare(title: str, runs: dict[str, Run], sets: int, exact: Tensor | None, size: float) -> None:
    """Prints a line for every candidate; `size` is what one run reads, in bytes."""
    found = []
    for name, run in runs.items():
        try:
            error = 0.0 if exact is None else float((run(0) - exact).norm() / exact.norm())
        except OutOfResources as reason:
            print(f"{title:30} {name:26} does not fit: {reason}")
            continue
        us = replay_us([lambda run=run, at=at: run(at) for at in range(sets)])
        found.append((us, name, "" if error < WRONG else f"WRONG by {error:.1e}"))
    floor = size / BYTES_PER_US
    for us, name, note in sorted(found):
        print(f"{title:30} {name:26} {us:8.2f} {floor:8.2f} {us / floor:6.2f} {note}", flush=True)


def label(name: str, sizes: tuple[int, ...]) -> str:
    return name + " " + " ".join(map(str, sizes))


def time_dense(pool: Tensor, name: str, num_tokens: int) -> None:
    num_rows, columns = DENSE[name]
    size = num_rows * columns
    sets = min(max(8, ROTATED_BYTES // (2 * size)), len(pool) // size)
    weights = pool[: sets * size].view(sets, num_rows, columns)
    x = torch.randn(num_tokens, columns).bfloat16()
    out = torch.empty(num_tokens, num_rows, dtype=torch.bfloat16)

    def dot(at: int, shape: ProductShape) -> Tensor:
        product(x, weights[at], None, out, shape)
        return out

    def rows(at: int, shape: RowsShape) -> Tensor:
        matvec(x, weights[at], None, out, shape)
        return out

    shape = product_shape(num_tokens, num_rows, can_tma=False)
    runs: dict[str, Run] = {
        "cuBLAS": lambda at: torch.mm(x, weights[at].T, out=out),
        "tl.dot, as planned": lambda at: dot(at, shape),
    }
    if num_tokens == 1:
        chosen = rows_shape(num_rows, columns)
        runs["rows, as planned"] = lambda at: rows(at, chosen)
        for sizes in FEW_ROWS if num_rows <= 512 else MATVEC:
            each = RowsShape(block_n=sizes[0], block_k=sizes[1], num_warps=sizes[2])
            if sizes[1] <= columns and each != chosen:
                runs[label("rows", sizes)] = lambda at, each=each: rows(at, each)
    else:
        for sizes in PRODUCT[:3] if num_rows <= 512 else PRODUCT:
            other = replace(shape, **of_sizes(sizes))
            runs[label("tl.dot", sizes)] = lambda at, other=other: dot(at, other)
    exact = None if name.endswith("head") else x.double() @ weights[0].double().T
    compare(f"{name} {num_tokens}", runs, sets, exact, 2.0 * size)


def of_sizes(sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("block_n", "block_k", "num_warps", "num_stages"), sizes, strict=True))


def make_experts(pool: Tensor, name: str) -> StackedExperts:
    hidden, count, _, inner = EXPERTS[name]
    both = pool[: count * 2 * inner * hidden].view(count, 2 * inner, hidden)
    down = pool[both.numel() :][: count * hidden * inner].view(count, hidden, inner)
    return StackedExperts(gate_EFM=both[:, :inner], up_EFM=both[:, inner:], down_EMF=down)


def exact_hidden(x: Tensor, ids: Tensor, experts: StackedExperts) -> Tensor:
    """Returns hidden [P, F] in the order of the pairs' numbers."""
    rows = x.double().repeat_interleave(ids.shape[1], 0)
    out = rows.new_empty(len(rows), experts.gate_EFM.shape[1])
    for expert in ids.unique().tolist():
        mine = ids.flatten() == expert
        gate = rows[mine] @ experts.gate_EFM[expert].double().T
        up = rows[mine] @ experts.up_EFM[expert].double().T
        out[mine] = torch.nn.functional.silu(gate) * up
    return out


def exact_parts(hidden: Tensor, weights: Tensor, ids: Tensor, experts: StackedExperts) -> Tensor:
    """Returns the weighted parts [P, M] of hidden in the order of the pairs' numbers."""
    out = hidden.new_empty(len(hidden), experts.down_EMF.shape[1], dtype=torch.float64)
    for expert in ids.unique().tolist():
        mine = ids.flatten() == expert
        out[mine] = hidden[mine].double() @ experts.down_EMF[expert].double().T
    return out * weights.double().flatten()[:, None]


def time_experts_of_one(pool: Tensor, name: str) -> None:
    hidden_size, count, top_k, inner = EXPERTS[name]
    experts, sets = make_experts(pool, name), count // top_k
    ids = torch.randperm(count, dtype=torch.int32)[: sets * top_k].view(sets, 1, top_k)
    weights = torch.rand(1, top_k)
    x = torch.randn(1, hidden_size).bfloat16()
    planned = pairs_shape(hidden_size, inner, top_k)
    hidden = gate_up_of_pairs(x, ids[0], experts, "silu", planned.gate_up)
    runs: dict[str, Run] = {}
    for sizes in GATE_UP:
        each = RowsShape(block_n=sizes[0], block_k=sizes[1], num_warps=sizes[2])
        note = "rows (planned)" if each == planned.gate_up else "rows"
        runs[label(note, sizes)] = lambda at, each=each: gate_up_of_pairs(
            x, ids[at], experts, "silu", each
        )
    exact = exact_hidden(x, ids[0], experts)
    size = 2.0 * top_k * hidden_size * inner
    compare(f"{name} gate_up 1", runs, sets, exact, 2 * size)
    runs = {}
    down = (planned.down.block_n, planned.down.block_k, planned.down.num_warps)
    for sizes in dict.fromkeys((*DOWN, down)):
        each = RowsShape(block_n=sizes[0], block_k=sizes[1], num_warps=sizes[2])
        note = "rows (planned)" if each == planned.down else "rows"
        runs[label(note, sizes)] = lambda at, each=each: down_and_combine(
            hidden, weights, ids[at], experts, each
        )
    exact = exact_parts(hidden, weights, ids[0], experts).sum(0, keepdim=True)
    compare(f"{name} down 1", runs, sets, exact, size)


def time_experts_of_many(pool: Tensor, name: str, num_tokens: int) -> None:
    hidden_size, count, top_k, inner = EXPERTS[name]
    experts = make_experts(pool, name)
    x = torch.randn(num_tokens, hidden_size).bfloat16()
    weights, all_ids = [], []
    router = Router(weights=(), rule=RoutingRule(top_k=top_k, renormalize=True))
    for _ in range(4):
        counts = torch.zeros(count, dtype=torch.int32)
        found = route.route(torch.randn(num_tokens, count), router, counts, None)
        weights.append(found[0])
        all_ids.append(found[1])
    shape = experts_shape(num_tokens, top_k, count, inner, can_tma=True)
    size = 2.0 * hidden_size * inner * sum(len(ids.unique()) for ids in all_ids) / len(all_ids)

    dispatches = [
        Dispatch(topk_ids=ids, pairs=None, num_experts=count, num_shared=0, rows=shape.block_p)
        for ids in all_ids
    ]

    def gate_up(at: int, tile: TileShape) -> Tensor:
        return grouped_gate_up(x, dispatches[at], experts, "silu", tile)

    hidden = gate_up(0, shape.gate_up)

    def down(at: int, tile: TileShape) -> Tensor:
        return grouped_down(hidden, weights[at], dispatches[at], experts, tile)

    exact = exact_hidden(x, all_ids[0], experts)
    runs: dict[str, Run] = {"as planned": lambda at: gate_up(at, shape.gate_up)}
    for sizes in MANY_GATE_UP:
        tile = replace(shape.gate_up, **of_sizes(sizes))
        runs[label("tl.dot", sizes)] = lambda at, tile=tile: gate_up(at, tile)
    compare(f"{name} gate_up {num_tokens}", runs, len(all_ids), exact, 2 * size)
    exact = exact_parts(hidden, weights[0], all_ids[0], experts)
    runs = {"as planned": lambda at: down(at, shape.down)}
    for sizes in MANY_DOWN:
        tile = replace(shape.down, **of_sizes(sizes))
        runs[label("tl.dot", sizes)] = lambda at, tile=tile: down(at, tile)
    compare(f"{name} down {num_tokens}", runs, len(all_ids), exact, size)


def time_sort(num_tokens: int, count: int, top_k: int) -> None:
    scores = torch.rand(32, num_tokens, count)
    ids = scores.topk(top_k).indices.to(torch.int32).contiguous()
    expected = torch.argsort(ids[0].flatten(), stable=True)
    limit = sort.UNCOUNTED_PAIRS
    for name, uncounted in (("one launch", limit), ("two launches", 0)):
        sort.UNCOUNTED_PAIRS = uncounted
        is_right = torch.equal(sort.sort_pairs(ids[0], count, 16).order_P.long(), expected)
        us = replay_us([lambda at=at: sort.sort_pairs(ids[at], count, 16) for at in range(32)])
        title = f"sort {num_tokens} tokens of {count}"
        print(f"{title:30} {name:26} {us:8.2f} {'' if is_right else 'WRONG'}", flush=True)
    sort.UNCOUNTED_PAIRS = limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="one,experts,sort,many,many-experts")
    parts = parser.parse_args().parts.split(",")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    print(f"{'shape, tokens':30} {'candidate':26}       us    floor  ratio")
    pool = torch.empty(POOL_NUMBERS, dtype=torch.bfloat16).normal_(std=0.02)
    if "one" in parts:
        for name in DENSE:
            time_dense(pool, name, 1)
    if "experts" in parts:
        for name in EXPERTS:
            time_experts_of_one(pool, name)
    if "sort" in parts:
        for num_tokens in (16, 32, 64, 128):
            time_sort(num_tokens, 128, 8)
    if "many" in parts:
        for name in DENSE:
            time_dense(pool, name, 32)
    if "many-experts" in parts:
        time_experts_of_many(pool, "qwen3", 32)


if __name__ == "__main__":
    main()
