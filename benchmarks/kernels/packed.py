"""Checks and times products with packed weights beside bf16 on one GPU.

python benchmarks/kernels/packed.py [check] [dense] [experts] [shapes] [--json FILE]
    [--formats q4_k,q6_k] [--models mixtral-8x7b] [--tokens 1,32]

`check` compares with float64 over the values that the planes stand for. A floor is the bytes that
are read over 3.0 TB/s, or operations over 780 TFLOP/s (1,560 of FP8), whichever is longer. Times
are of graphs over weights that are together larger than the L2 cache. `shapes` times launch shapes
of the kernels of few tokens, best first. All kernels are built before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product as every

import torch
from attention import BYTES_PER_SECOND, graph_ms
from packed_cases import (
    CUDA,
    FORMATS,
    MODELS,
    TOKENS,
    Model,
    Wanted,
    error_of,
    exact_experts,
    numbers,
    planes,
    routes,
    rows_of,
    stack,
    tickets,
)
from torch import Tensor

from octavo.kernels.planes import Planes, has_tile_scales, values_of
from octavo.kernels.triton.experts.choose import run_experts
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.packed_pairs import packed_experts_of_pairs
from octavo.kernels.triton.experts.shapes import (
    ExpertsShape,
    PackedPairsShape,
    TileShape,
    experts_shape,
    packed_experts_shape,
)
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.experts.unpacked import unpacked_experts
from octavo.kernels.triton.launching import building
from octavo.kernels.triton.product.choose import multiply, multiply_packed
from octavo.kernels.triton.product.packed import packed_matvec, packed_product, unpack
from octavo.kernels.triton.product.packed_shapes import PackedShape, SumsShape
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.planes import PLANE_LAYOUTS, PlaneLayout

FLOPS, FP8_FLOPS = 780e12, 1560e12
LEAST_BYTES = 256 << 20
CHECKED = (
    *("int4_128_f16", "int4_64_bf16", "int4_32_f16", "int8_128", "fp8_row", "fp8"),
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "nvfp4", "iq4_nl", "iq4_xs"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
ODD = ("int4_64_bf16", "fp8", "q8_0", "q5_1", "q6_k")
"""Checked with a number of columns that is no multiple of theirs."""


ROWS = 400
TILED_ROWS = 384
"""Of weights that are checked."""
RESULTS: list[dict[str, object]] = []
Call = Callable[[], object]


def flops_of(name: str) -> float:
    """Returns operations a second of the tensor cores that a format could use."""
    return FP8_FLOPS if name.startswith("fp8") else FLOPS


def report(case: str, name: str, floor_s: float, ms: float, bf16_ms: float | None) -> float:
    us, floor_us = ms * 1e3, floor_s * 1e6
    beside = 1.0 if bf16_ms is None else ms / bf16_ms
    print(f"| {case} | {name} | {floor_us:.1f} | {us:.1f} | {us / floor_us:.2f} | {beside:.2f} |")
    sys.stdout.flush()
    RESULTS.append(
        {"case": case, "format": name, "floor_us": floor_us, "us": us, "against_bf16": beside}
    )
    return ms if bf16_ms is None else bf16_ms


def told(case: str, found: Tensor, expected: Tensor, limit: float) -> None:
    error = error_of(found, expected)
    RESULTS.append({"case": case, "error": error, "ok": error < limit})
    print("ok" if error < limit else "WRONG", case, f"{error:.1e}", flush=True)


# Checks


def checks(
    wanted: Wanted,
) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor], float]]:
    """Yields cases, what is found, what is expected, and the error that is let pass."""
    for name in CHECKED:
        if wanted.formats != FORMATS and name not in wanted.formats:
            continue
        layout = PLANE_LAYOUTS[name]
        for cols in (1184 if layout.step < 256 else 1120,) if name in ODD else (512,):
            rows = TILED_ROWS if name == "fp8" else ROWS
            weight = planes(layout, rows, cols)
            is_by_tile = has_tile_scales(weight, layout)
            exact = partial(values_of, layout, weight, cols)
            unpacked = partial(unpack, weight, layout, cols, torch.bfloat16)
            yield f"{name} {cols} unpacked", unpacked, exact, 3e-3
            for count in (1, 30, 60, 600):
                x = rows_of(count, cols)
                is_fp8 = name.startswith("fp8") and count >= 256

                def found(
                    x: Tensor = x,
                    weight: Planes = weight,
                    of: PlaneLayout = layout,
                    is_by_tile: bool = is_by_tile,
                ) -> Tensor:
                    out = torch.empty(len(x), len(weight.codes), device=CUDA, dtype=torch.bfloat16)
                    rest = weight, of, None, out, tickets()
                    multiply_packed(x, *rest, is_deterministic=False, is_by_tile=is_by_tile)
                    return out

                def expected(x: Tensor = x, exact: Callable[[], Tensor] = exact) -> Tensor:
                    return x.double() @ exact().double().T

                yield f"{name} {cols} dense {count}", found, expected, 5e-2 if is_fp8 else 4e-3
        model = Model(512, 384, 8, 2, ())
        experts = stack(model, name)
        for count in (1, 40, 200, 2200):
            x, chosen = rows_of(count, model.hidden), routes(model, count)
            is_fp8 = name.startswith("fp8") and count > 1
            yield (
                f"{name} experts {count}",
                partial(run, x, *chosen, experts),
                partial(exact_experts, x, *chosen, experts, model),
                6e-2 if is_fp8 else 8e-3,
            )


def run(x: Tensor, weights: Tensor, ids: Tensor, experts: StackedExperts) -> Tensor:
    return run_experts(
        *(x, weights, ids, experts, "silu", None, None, Shapes(), tickets()),
        is_deterministic=False,
        in_parts=False,
    )[0]


def check(wanted: Wanted) -> None:
    for case, found, expected, limit in checks(wanted):
        told(case, found(), expected(), limit)


# Times


def models(wanted: Wanted) -> dict[str, Model]:
    return {name: model for name, model in MODELS.items() if name in (wanted.models or MODELS)}


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
        for _ in range(copies):
            rest = (None, out, Shapes(), tickets())
            calls.append(partial(multiply, x, numbers(rows, cols), *rest, is_deterministic=False))
    else:
        for _ in range(copies):
            rest = (planes(layout, rows, cols), layout, None, out, tickets())
            by_tile = {"is_deterministic": False, "is_by_tile": name == "fp8"}
            calls.append(partial(multiply_packed, x, *rest, **by_tile))
    floor = max(rows * row_bytes / BYTES_PER_SECOND, 2 * count * rows * cols / flops_of(name))
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
    return calls, max(moved / BYTES_PER_SECOND, flops / flops_of(name))


def dense(wanted: Wanted) -> None:
    for (title, model), count in every(models(wanted).items(), wanted.tokens):
        for rows, cols in model.dense:
            base = None
            for name in wanted.formats:
                calls, floor = dense_calls(model, rows, cols, name, count)
                ms = graph_ms(calls, 10)
                base = report(f"{title} [{rows}, {cols}] x {count}", name, floor, ms, base)


def experts(wanted: Wanted) -> None:
    for title, model in models(wanted).items():
        base: dict[int, float] = {}
        for name in wanted.formats:
            made = stack(model, name)
            for count in wanted.tokens:
                calls, floor = expert_calls(model, made, name, count)
                ms = graph_ms(calls, 8)
                of_bf16 = base.get(count)
                case = f"{title} experts x {count}"
                base[count] = report(case, name, floor, ms, of_bf16)


# Launch shapes


ShapeCase = tuple[str, str, object, Callable[[], list[Call]]]
"""A case, a format, a launch shape, and what makes its calls."""


def shape_cases(wanted: Wanted) -> Iterator[ShapeCase]:
    formats = ("int4_128_f16", "q4_k") if wanted.formats == FORMATS else wanted.formats
    for name in formats:
        yield from _dense_shapes(name)
        for title, model in models(wanted).items():
            made = stack(model, name)
            yield from _lone_shapes(title, model, name, made)
            for count in (one for one in wanted.tokens if 1 < one < 8192):
                yield from _expert_shapes(title, model, name, made, count)


def _dense_shapes(name: str) -> Iterator[ShapeCase]:
    layout = PLANE_LAYOUTS[name]
    weights = [planes(layout, 6144, 4096) for _ in range(8)]
    out = torch.empty(32, 6144, device=CUDA, dtype=torch.bfloat16)

    def each(call: Callable[..., object], x: Tensor, shape: object) -> Callable[[], list[Call]]:
        calls: list[Call] = [
            partial(call, x, one, layout, None, out[: len(x)], shape) for one in weights
        ]
        return partial(list, calls)

    for block_n, words, warps in every((4, 8), (512, 1024), (2, 4)):
        shape = SumsShape(block_n=block_n, words=words, num_warps=warps)
        yield "[6144, 4096] x 1", name, shape, each(packed_matvec, rows_of(1, 4096), shape)
    for count, block_k, stages in every((1, 32), (128, 256), (3, 4, 6)):
        tile = PackedShape(
            block_t=max(16, count), block_n=64, block_k=block_k, num_warps=4, num_stages=stages
        )
        case = f"[6144, 4096] x {count}"
        yield case, name, tile, each(packed_product, rows_of(count, 4096), tile)


def _lone_shapes(title: str, model: Model, name: str, made: StackedExperts) -> Iterator[ShapeCase]:
    lone = [(rows_of(1, model.hidden), *routes(model, 1, seed), made, "silu") for seed in range(4)]
    usual = SumsShape(block_n=2, words=512, num_warps=4)
    for block_n, words in every((2, 4, 8), (128, 512)):
        size = SumsShape(block_n=block_n, words=words, num_warps=4)
        for pair in (
            PackedPairsShape(gate_up=size, down=usual),
            PackedPairsShape(gate_up=usual, down=size),
        ):
            calls: list[Call] = [partial(packed_experts_of_pairs, *c, pair) for c in lone]
            yield f"{title} experts x 1", name, pair, partial(list, calls)
    for block_k, stages in every((128, 256), (4, 6)):
        tile = TileShape(block_n=64, block_k=block_k, group=1, num_warps=4, num_stages=stages)
        shape = ExpertsShape(is_direct=False, block_p=16, gate_up=tile, down=tile)
        calls = [partial(grouped_experts, *c, shape) for c in lone]
        yield f"{title} experts x 1", name, shape, partial(list, calls)


def _expert_shapes(
    title: str, model: Model, name: str, made: StackedExperts, count: int
) -> Iterator[ShapeCase]:
    x, chosen = rows_of(count, model.hidden), routes(model, count)
    layouts = made.gate_layout, made.down_layout
    base = packed_experts_shape(count, model.top_k, model.experts, *layouts)
    rows = {base.block_p, max(16, base.block_p // 2)}
    for block_p, block_n, block_k, stages in every(rows, (64, 128), (128, 256), (3, 5)):
        if block_n * block_p > 64 * 64:
            continue
        tile = TileShape(block_n=block_n, block_k=block_k, group=4, num_warps=4, num_stages=stages)
        for shape in (
            replace(base, block_p=block_p, gate_up=tile),
            replace(base, block_p=block_p, down=tile),
        ):
            call = partial(grouped_experts, x, *chosen, made, "silu", shape)
            yield f"{title} experts x {count}", name, shape, partial(list, [call] * 3)
    numbers = partial(_by_numbers, x, chosen, made)
    yield f"{title} experts x {count}", name, "unpacked", partial(list, [numbers] * 2)


def _by_numbers(x: Tensor, chosen: tuple[Tensor, Tensor], made: StackedExperts) -> Tensor:
    shape = experts_shape(len(x), chosen[1].shape[1], made.count, made.inner_size, can_tma=True)
    return unpacked_experts(x, *chosen, made, "silu", shape)


def shapes(wanted: Wanted) -> None:
    times: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case, name, shape, calls in shape_cases(wanted):
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


def build(jobs: list[str], wanted: Wanted) -> None:
    """Builds the kernels of the jobs side by side; runs none of them."""
    began = time.perf_counter()
    with building.building(min(32, os.cpu_count() or 1)):
        if "check" in jobs:
            for _, found, _, _ in checks(wanted):
                found()
        if "dense" in jobs:
            for (_, model), count in every(models(wanted).items(), wanted.tokens):
                for (rows, cols), name in every(model.dense, wanted.formats):
                    dense_calls(model, rows, cols, name, count)[0][0]()
        if "experts" in jobs:
            for model, name in every(models(wanted).values(), wanted.formats):
                made = stack(model, name)
                for count in wanted.tokens:
                    expert_calls(model, made, name, count)[0][0]()
                del made
        if "shapes" in jobs:
            for _, _, _, calls in shape_cases(wanted):
                calls()[0]()
    torch.cuda.synchronize()
    print(f"kernels are built after {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    jobs = {"check": check, "dense": dense, "experts": experts, "shapes": shapes}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", choices=[[], *jobs], default=list(jobs))
    parser.add_argument("--json", dest="target")
    for name in ("formats", "models", "tokens"):
        parser.add_argument(f"--{name}", type=lambda text: tuple(text.split(",")))
    given = parser.parse_args()
    wanted = Wanted(
        formats=given.formats or FORMATS,
        models=given.models or (),
        tokens=tuple(map(int, given.tokens or TOKENS)),
    )
    torch.manual_seed(0)
    print(torch.__version__, torch.cuda.get_device_name())
    build(given.jobs, wanted)
    for name in given.jobs:
        print(f"== {name}: case, format, floor us, measured us, ratio, against bf16")
        began = time.perf_counter()
        try:
            jobs[name](wanted)
        finally:
            if given.target is not None:
                write(given.target)
        print(f"{name} took {time.perf_counter() - began:.1f} s", flush=True)


def write(target: str) -> None:
    device = torch.cuda.get_device_name()
    with open(target, "w", encoding="utf-8") as file:
        for one in RESULTS:
            file.write(json.dumps(one | {"device": device}) + "\n")


if __name__ == "__main__":
    main()
