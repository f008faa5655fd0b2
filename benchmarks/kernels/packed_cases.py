"""Models, formats and random weights of what `packed.py` checks and times, on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from octavo.kernels.planes import Planes, empty_planes, values_of
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.planes import PLANE_LAYOUTS, PlaneLayout
from octavo.weights.random_planes import fill_random

CUDA = torch.device("cuda", 0)
FORMATS = (
    *("bf16", "int4_128_f16", "fp8_row", "fp8", "mxfp4", "nvfp4", "q8_0", "q4_k", "q5_k", "q6_k"),
    *("q2_k", "q3_k", "q5_0", "q5_1", "iq4_xs"),
)
TOKENS = (1, 8, 32, 128, 512, 2048)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is run, where not all of it is."""

    formats: tuple[str, ...] = FORMATS
    models: tuple[str, ...] = ()
    tokens: tuple[int, ...] = TOKENS


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


def generator() -> torch.Generator:
    return torch.Generator(CUDA).manual_seed(0)


def planes(layout: PlaneLayout, rows: int, cols: int) -> Planes:
    made = empty_planes(layout, rows, cols, CUDA)
    fill_random(layout, made, 2 * cols**-0.5, generator())
    return made


def numbers(*sizes: int) -> Tensor:
    return torch.empty(*sizes, device=CUDA, dtype=torch.bfloat16).normal_(std=sizes[-1] ** -0.5)


@cache
def tickets() -> Tensor:
    return make_tickets(CUDA)


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
        is_by_tile=name == "fp8",
    )


def routes(model: Model, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(count, model.experts, device=CUDA, generator=generator().manual_seed(seed))
    weights, ids = drawn.topk(model.top_k)
    return weights.float(), ids.int()


def error_of(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


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
