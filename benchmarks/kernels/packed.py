"""Checks and times products with packed weights beside bf16 on one GPU.

python benchmarks/kernels/packed.py [check] [dense] [experts] [shapes] [--json FILE]

`check` compares with float64 over the values that the planes stand for. A floor is the bytes that
are read over 3.0 TB/s, or operations over 780 TFLOP/s (1,560 of FP8), whichever is longer. Times
are of graphs over weights that are together larger than the L2 cache. `shapes` times launch shapes
of the kernels of few tokens, best first. All kernels are built before anything is timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as every

import torch
from attention import BYTES_PER_SECOND, graph_ms
from torch import Tensor

from octavo.kernels.planes import Planes, empty_planes, values_of
from octavo.kernels.triton.experts.choose import run_experts
from octavo.kernels.triton.experts.fp8 import fp8_experts
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.packed_pairs import packed_experts_of_pairs
from octavo.kernels.triton.experts.shapes import (
    Fp8ExpertsShape,
    PackedPairsShape,
    TileShape,
    fp8_experts_shape,
    packed_experts_shape,
)
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching import building
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.choose import multiply, multiply_packed
from octavo.kernels.triton.product.fp8 import fp8_product
from octavo.kernels.triton.product.packed import packed_matvec, packed_product, unpack
from octavo.kernels.triton.product.packed_shapes import Fp8Shape, PackedShape, SumsShape
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.planes import PLANE_LAYOUTS, PlaneLayout
from octavo.weights.random_planes import fill_random

CUDA = torch.device("cuda", 0)
FORMATS = ("bf16", "int4_128_f16", "fp8_row", "fp8")
FLOPS = {"bf16": 780e12, "int4_128_f16": 780e12, "fp8_row": 1560e12, "fp8": 1560e12}
LEAST_BYTES = 256 << 20
CHECKED = (
    *("int4_128_f16", "int4_64_bf16", "int4_32_f16", "int8_128", "fp8_row", "fp8"),
    *("q8_0", "q4_0", "q4_1", "mxfp4"),
)
ODD = ("int4_64_bf16", "fp8", "q8_0")
"""Checked with a number of columns that is no multiple of theirs."""


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    inner: int
    experts: int
    top_k: int
    dense: tuple[tuple[int, int], ...]
    """Rows and columns of its largest dense products: qkv and output."""


MODELS = {
    "mixtral-8x7b": Model(4096, 14336, 8, 2, ((6144, 4096), (4096, 4096))),
    "qwen3-30b": Model(2048, 768, 128, 8, ((5120, 2048), (2048, 4096))),
}
TOKENS = (1, 32, 8192)
EXPERT_TOKENS = (1, 32, 128, 512, 8192)
ROWS = 400
"""Of weights that are checked."""
RESULTS: list[dict[str, object]] = []
Call = Callable[[], object]


def generator() -> torch.Generator:
    return torch.Generator(CUDA).manual_seed(0)


def planes(layout: PlaneLayout, rows: int, cols: int) -> Planes:
    made = empty_planes(layout, rows, cols, CUDA)
    fill_random(layout, made, 2 * cols**-0.5, generator())
    return made


def numbers(*sizes: int) -> Tensor:
    return torch.empty(*sizes, device=CUDA, dtype=torch.bfloat16).normal_(std=sizes[-1] ** -0.5)


def rows_of(count: int, cols: int) -> Tensor:
    return torch.randn(count, cols, device=CUDA).bfloat16()


def stack(model: Model, name: str) -> StackedExperts:
    E, F, M = model.experts, model.inner, model.hidden
    if name == "bf16":
        return StackedExperts(
            gate_EFM=numbers(E, F, M), up_EFM=numbers(E, F, M), down_EMF=numbers(E, M, F)
        )
    layout = PLANE_LAYOUTS[name]
    gate, up, down = planes(layout, E * F, M), planes(layout, E * F, M), planes(layout, E * M, F)
    return StackedExperts(
        gate_EFM=gate.codes.view(E, F, -1),
        up_EFM=up.codes.view(E, F, -1),
        down_EMF=down.codes.view(E, M, -1),
        gate_up_planes=(gate, up),
        gate_layout=layout,
        down_planes=down,
        down_layout=layout,
    )


def routes(model: Model, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(count, model.experts, device=CUDA, generator=generator().manual_seed(seed))
    weights, ids = drawn.topk(model.top_k)
    return weights.float(), ids.int()


def report(case: str, name: str, floor_s: float, ms: float, bf16_ms: float | None) -> float:
    us, floor_us = ms * 1e3, floor_s * 1e6
    beside = 1.0 if bf16_ms is None else ms / bf16_ms
    print(f"| {case} | {name} | {floor_us:.1f} | {us:.1f} | {us / floor_us:.2f} | {beside:.2f} |")
    sys.stdout.flush()
    RESULTS.append(
        {"case": case, "format": name, "floor_us": floor_us, "us": us, "against_bf16": beside}
    )
    return ms if bf16_ms is None else bf16_ms


def error_of(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def told(case: str, found: Tensor, expected: Tensor, limit: float) -> None:
    error = error_of(found, expected)
    RESULTS.append({"case": case, "error": error, "ok": error < limit})
    print("ok" if error < limit else "WRONG", case, f"{error:.1e}", flush=True)


# Checks


def checks() -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor], float]]:
    """Yields cases, what is found, what is expected, and the error that is let pass."""
    for name in CHECKED:
        layout = PLANE_LAYOUTS[name]
        for cols in (1184,) if name in ODD else (512,):
            weight = planes(layout, ROWS, cols)
            exact = partial(values_of, layout, weight, cols)
            unpacked = partial(unpack, weight, layout, cols, torch.bfloat16)
            yield f"{name} {cols} unpacked", unpacked, exact, 3e-3
            for count in (1, 30, 60, 600):
                x = rows_of(count, cols)
                is_fp8 = name == "fp8_row" and count >= 256

                def found(
                    x: Tensor = x, weight: Planes = weight, of: PlaneLayout = layout
                ) -> Tensor:
                    out = torch.empty(len(x), ROWS, device=CUDA, dtype=torch.bfloat16)
                    multiply_packed(x, weight, of, None, out, is_deterministic=False)
                    return out

                def expected(x: Tensor = x, exact: Callable[[], Tensor] = exact) -> Tensor:
                    return x.double() @ exact().double().T

                yield f"{name} {cols} dense {count}", found, expected, 5e-2 if is_fp8 else 4e-3
        model = Model(512, 384, 8, 2, ())
        experts = stack(model, name)
        for count in (1, 40, 200, 2200):
            x, chosen = rows_of(count, model.hidden), routes(model, count)
            is_fp8 = name == "fp8_row" and count * 2 >= 32 * 8
            yield (
                f"{name} experts {count}",
                partial(run, x, *chosen, experts),
                partial(exact_experts, x, *chosen, experts, model),
                6e-2 if is_fp8 else 8e-3,
            )


def run(x: Tensor, weights: Tensor, ids: Tensor, experts: StackedExperts) -> Tensor:
    return run_experts(
        *(x, weights, ids, experts, "silu", None, None, Shapes()),
        is_deterministic=False,
        in_parts=False,
    )[0]


def exact_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: StackedExperts, model: Model
) -> Tensor:
    layout = experts.gate_layout
    assert layout is not None
    assert experts.gate_up_planes is not None
    assert experts.down_planes is not None
    gate, up = (
        values_of(layout, one, model.hidden).view(model.experts, model.inner, -1).double()
        for one in experts.gate_up_planes
    )
    down = values_of(layout, experts.down_planes, model.inner).double()
    down = down.view(model.experts, model.hidden, -1)
    out = torch.zeros(x.shape, dtype=torch.double, device=CUDA)
    for expert in range(model.experts):
        row, choice = (ids == expert).nonzero(as_tuple=True)
        some = x[row].double()
        hidden = torch.nn.functional.silu(some @ gate[expert].T) * (some @ up[expert].T)
        out.index_add_(0, row, weights[row, choice, None].double() * (hidden @ down[expert].T))
    return out


def check() -> None:
    for case, found, expected, limit in checks():
        told(case, found(), expected(), limit)


# Times


def dense_calls(
    model: Model, rows: int, cols: int, name: str, count: int
) -> tuple[list[Call], float]:
    """Returns calls over different weights, and their floor in seconds."""
    layout = PLANE_LAYOUTS.get(name)
    row_bytes = 2 * cols if layout is None else layout.row_bytes(cols)
    copies = min(64, max(1, -(-LEAST_BYTES // (rows * row_bytes)))) if count < 1000 else 2
    x, calls = rows_of(count, cols), []
    out = torch.empty(count, rows, device=CUDA, dtype=torch.bfloat16)
    if layout is None:
        tickets = make_tickets(CUDA)
        for _ in range(copies):
            rest = (None, out, Shapes(), tickets)
            calls.append(partial(multiply, x, numbers(rows, cols), *rest, is_deterministic=False))
    else:
        for _ in range(copies):
            rest = (planes(layout, rows, cols), layout, None, out)
            calls.append(partial(multiply_packed, x, *rest, is_deterministic=False))
    floor = max(rows * row_bytes / BYTES_PER_SECOND, 2 * count * rows * cols / FLOPS[name])
    return calls, floor


def expert_calls(
    model: Model, experts: StackedExperts, name: str, count: int
) -> tuple[list[Call], float]:
    layout = PLANE_LAYOUTS.get(name)
    sets = [routes(model, count, seed) for seed in range(4 if count < 1000 else 1)]
    x = rows_of(count, model.hidden)
    calls: list[Call] = [partial(run, x, *one, experts) for one in sets]
    hit = sum(len(ids.unique()) for _, ids in sets) / len(sets)

    def row(cols: int) -> int:
        return 2 * cols if layout is None else layout.row_bytes(cols)

    moved = hit * (2 * model.inner * row(model.hidden) + model.hidden * row(model.inner))
    flops = count * model.top_k * 6 * model.hidden * model.inner
    return calls, max(moved / BYTES_PER_SECOND, flops / FLOPS[name])


def dense() -> None:
    for (title, model), count in every(MODELS.items(), TOKENS):
        for rows, cols in model.dense:
            base = None
            for name in FORMATS:
                calls, floor = dense_calls(model, rows, cols, name, count)
                ms = graph_ms(calls, 10)
                base = report(f"{title} [{rows}, {cols}] x {count}", name, floor, ms, base)


def experts() -> None:
    for title, model in MODELS.items():
        base: dict[int, float] = {}
        for name in FORMATS:
            made, floor = stack(model, name), 0.0
            for count in EXPERT_TOKENS:
                calls, floor = expert_calls(model, made, name, count)
                ms = graph_ms(calls, 8)
                of_bf16 = base.get(count)
                case = f"{title} experts x {count}"
                base[count] = report(case, name, floor, ms, of_bf16)
            if name == "fp8":
                shape = fp8_experts_shape(8192, model.top_k, model.experts, by_block=True)
                x, chosen = rows_of(8192, model.hidden), routes(model, 8192)
                call = partial(fp8_experts, x, *chosen, made, "silu", shape)
                case = f"{title} experts x 8192, activations in FP8"
                report(case, name, floor, graph_ms([call], 8), base[8192])


# Launch shapes


def shape_cases() -> Iterator[tuple[str, str, object, Callable[[], list[Call]]]]:
    """Yields a case, a format, a launch shape, and what makes its calls."""
    for name in ("int4_128_f16", "fp8_row"):
        layout = PLANE_LAYOUTS[name]
        weights = [planes(layout, 6144, 4096) for _ in range(8)]
        out = torch.empty(32, 6144, device=CUDA, dtype=torch.bfloat16)
        for block_n, words, warps in every((2, 4, 8), (512, 1024), (2, 4)):
            shape = SumsShape(block_n=block_n, words=words, num_warps=warps)
            x = rows_of(1, 4096)
            yield (
                "matvec [6144, 4096]",
                name,
                shape,
                partial(_each, packed_matvec, x, weights, layout, out[:1], shape),
            )
        for block_n, block_k, stages in every((32, 64), (128, 256), (4, 6)):
            wide = PackedShape(
                block_t=32, block_n=block_n, block_k=block_k, num_warps=4, num_stages=stages
            )
            yield (
                "product [6144, 4096] x 32",
                name,
                wide,
                partial(_each, packed_product, rows_of(32, 4096), weights, layout, out, wide),
            )
        yield from _expert_shapes(name)
    yield from _fp8_shapes()


def _each(
    call: Callable[..., object],
    x: Tensor,
    weights: list[Planes],
    layout: PlaneLayout,
    out: Tensor,
    shape: object,
) -> list[Call]:
    return [partial(call, x, one, layout, None, out, shape) for one in weights]


def _expert_shapes(name: str) -> Iterator[tuple[str, str, object, Callable[[], list[Call]]]]:
    for title, model in MODELS.items():
        made, one = stack(model, name), rows_of(1, model.hidden)
        few, chosen = rows_of(32, model.hidden), routes(model, 32)
        lone = [(one, *routes(model, 1, seed), made, "silu") for seed in range(4)]
        usual = SumsShape(block_n=2, words=512, num_warps=4)
        sizes = [
            SumsShape(block_n=n, words=w, num_warps=4) for n, w in every((1, 2, 4), (128, 512))
        ]
        sizes += [SumsShape(block_n=n, words=512, num_warps=2) for n in (2, 4)]
        for size in sizes:
            for pair in (
                PackedPairsShape(gate_up=size, down=usual),
                PackedPairsShape(gate_up=usual, down=size),
            ):
                calls: list[Call] = [partial(packed_experts_of_pairs, *c, pair) for c in lone]
                yield f"{title} experts x 1", name, pair, partial(list, calls)
        base = packed_experts_shape(32, model.top_k, model.experts)
        for block_n, block_k, stages in every((32, 64, 128), (128, 256), (3, 5)):
            tile = TileShape(
                block_n=block_n, block_k=block_k, group=1, num_warps=4, num_stages=stages
            )
            shape = replace(base, gate_up=tile, down=tile)
            call = partial(grouped_experts, few, *chosen, made, "silu", shape)
            yield f"{title} experts x 32", name, shape, partial(list, [call] * 3)


def _fp8_shapes() -> Iterator[tuple[str, str, object, Callable[[], list[Call]]]]:
    for name in ("fp8_row", "fp8"):
        layout = PLANE_LAYOUTS[name]
        weight, x = planes(layout, 6144, 4096), rows_of(8192, 4096)
        out = torch.empty(8192, 6144, device=CUDA, dtype=torch.bfloat16)
        for block_n, warps, stages in (
            (128, 8, 3),
            (128, 8, 4),
            (128, 4, 4),
            (256, 8, 3),
            (64, 4, 5),
        ):
            shape = Fp8Shape(
                block_t=128, block_n=block_n, block_k=128, num_warps=warps, num_stages=stages
            )
            call = partial(fp8_product, x, weight, layout, None, out, shape)
            yield "fp8 [6144, 4096] x 8192", name, shape, partial(list, [call] * 4)
        for title, model in MODELS.items():
            made, chosen = stack(model, name), routes(model, 8192)
            tokens = rows_of(8192, model.hidden)
            usual = Fp8Shape(block_t=128, block_n=128, block_k=128, num_warps=8, num_stages=4)
            for block_n, warps, stages in ((64, 8, 3), (64, 4, 4), (128, 8, 3), (128, 8, 4)):
                gate_up = Fp8Shape(
                    block_t=128, block_n=block_n, block_k=128, num_warps=warps, num_stages=stages
                )
                whole = Fp8ExpertsShape(rows=128, gate_up=gate_up, down=usual)
                one = partial(fp8_experts, tokens, *chosen, made, "silu", whole)
                yield f"{title} experts x 8192", name, whole, partial(list, [one] * 2)


def shapes() -> None:
    times: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case, name, shape, calls in shape_cases():
        try:
            ms = graph_ms(calls(), 6)
        except Exception as error:  # a shape may want more than there is
            print("refused", case, name, shape, str(error)[:60])
            continue
        times.setdefault((case, name), []).append((ms, str(shape)))
    for (case, name), found in times.items():
        for ms, shape in sorted(found)[:4]:
            print(f"| {case} | {name} | {ms * 1e3:.1f} | {shape} |", flush=True)
        for ms, shape in found:
            RESULTS.append({"case": case, "format": name, "us": ms * 1e3, "shape": shape})


# All


def build(jobs: list[str]) -> None:
    """Builds the kernels of the jobs side by side; runs none of them."""
    began = time.perf_counter()
    with building.building(min(32, os.cpu_count() or 1)):
        if "check" in jobs:
            for _, found, _, _ in checks():
                found()
        if "dense" in jobs:
            for (_, model), count in every(MODELS.items(), TOKENS):
                for (rows, cols), name in every(model.dense, FORMATS):
                    dense_calls(model, rows, cols, name, count)[0][0]()
        if "experts" in jobs:
            for model, name in every(MODELS.values(), FORMATS):
                made = stack(model, name)
                for count in EXPERT_TOKENS:
                    expert_calls(model, made, name, count)[0][0]()
                del made
        if "shapes" in jobs:
            for _, _, _, calls in shape_cases():
                calls()[0]()
    torch.cuda.synchronize()
    print(f"kernels are built after {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    jobs = {"check": check, "dense": dense, "experts": experts, "shapes": shapes}
    wanted, target = sys.argv[1:], None
    if "--json" in wanted:
        at = wanted.index("--json")
        target = wanted[at + 1]
        del wanted[at : at + 2]
    wanted = wanted or list(jobs)
    torch.manual_seed(0)
    print(torch.__version__, torch.cuda.get_device_name())
    build(wanted)
    for name in wanted:
        print(f"== {name}: case, format, floor us, measured us, ratio, against bf16")
        began = time.perf_counter()
        try:
            jobs[name]()
        finally:
            if target is not None:
                device = torch.cuda.get_device_name()
                with open(target, "w", encoding="utf-8") as file:
                    for one in RESULTS:
                        file.write(json.dumps(one | {"device": device}) + "\n")
        print(f"{name} took {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
