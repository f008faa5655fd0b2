"""Random packed weights at small shapes, and experts made of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.activations import Activation, ClampedSwiGLU
from octavo.kernels.planes import Planes, empty_planes, values_of
from octavo.planes import PLANE_LAYOUTS, PlaneLayout
from octavo.weights.random_planes import fill_random
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.experts.choose import run_experts  # isort: skip
from octavo.kernels.triton.experts.stacks import StackedExperts  # isort: skip
from octavo.kernels.triton.tuning.shapes import Shapes  # isort: skip
from octavo.kernels.weights import ExpertBiases, Weight  # isort: skip


FLOAT_ERROR = 2e-6 if DEVICE == "cpu" else 2e-5
"""Of float32 products with packed weights. A GPU takes centres and minima off sums, where they
cancel."""


def planes(layout: PlaneLayout, rows: int, cols: int, seed: int = 0) -> Planes:
    made = empty_planes(layout, rows, cols, torch.device(DEVICE))
    generator = torch.Generator(DEVICE).manual_seed(seed)
    fill_random(layout, made, 1.0, generator)
    if layout.offset == "zero":
        made.offsets.random_(0, 1 << layout.bits, generator=generator)
    return made


def fp8_weight(layout: PlaneLayout, rows: int, cols: int) -> Weight:
    """Returns a random weight in FP8, as kernels are given it."""
    made = planes(layout, rows, cols)
    form = WEIGHT_FORMATS["fp8"]
    return Weight(data=made.codes, format=form, rows=rows, cols=cols, planes=made, layout=layout)


def error_of(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


LARGEST = 448.0


def rounded(x: Tensor, *, by_block: bool) -> Tensor:
    """Returns what x [T, M] is in float64 after rounding to e4m3."""
    groups = x.float().view(len(x), -1, 128 if by_block else x.shape[1])
    scales = groups.abs().amax(2, keepdim=True).clamp_min(1e-10) / LARGEST
    numbers = (groups / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (numbers.double() * scales.double()).view(x.shape)


def packed_experts(
    gate: str, down: str, count: int, hidden: int, inner: int
) -> tuple[StackedExperts, tuple[Tensor, Tensor, Tensor]]:
    """Returns experts with gate and up in one layout and down in another, and their values."""
    of_gate, of_down = PLANE_LAYOUTS[gate], PLANE_LAYOUTS[down]
    gates, ups = (planes(of_gate, count * inner, hidden, seed) for seed in (1, 2))
    downs = planes(of_down, count * hidden, inner, 3)
    experts = StackedExperts(
        gate_EFM=gates.codes.view(count, inner, -1),
        up_EFM=ups.codes.view(count, inner, -1),
        down_EMF=downs.codes.view(count, hidden, -1),
        gate_up_planes=(gates, ups),
        gate_layout=of_gate,
        down_planes=downs,
        down_layout=of_down,
    )
    exact = (
        values_of(of_gate, gates, hidden).view(count, inner, hidden).double(),
        values_of(of_gate, ups, hidden).view(count, inner, hidden).double(),
        values_of(of_down, downs, inner).view(count, hidden, inner).double(),
    )
    return experts, exact


def with_biases(experts: StackedExperts) -> StackedExperts:
    """Returns the experts with random biases of all their products."""
    generator = torch.Generator().manual_seed(4)

    def some(size: int) -> Tensor:
        return torch.randn(experts.count, size, generator=generator).to(DEVICE) * 0.3

    inner, hidden = experts.inner_size, experts.hidden_size
    biases = ExpertBiases(gate_EF=some(inner), up_EF=some(inner), down_EM=some(hidden))
    return replace(experts, biases=biases)


def expected_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    values: tuple[Tensor, ...],
    biases: ExpertBiases | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """Returns the weighted sum of the chosen experts with these values, in float64."""
    out = torch.zeros(x.shape, dtype=torch.double, device=DEVICE)
    for row in range(len(x)):
        for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
            if expert >= 0:
                gate, up, down = (one[expert] for one in values)
                of_gate, of_up = gate @ x[row].double(), up @ x[row].double()
                if biases is not None:
                    of_gate, of_up = of_gate + biases.gate_EF[expert], of_up + biases.up_EF[expert]
                made = down @ _activated(of_gate, of_up, activation)
                if biases is not None:
                    made = made + biases.down_EM[expert]
                out[row] += weight.double() * made
    return out


def _activated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if isinstance(activation, ClampedSwiGLU):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    assert activation == "silu"
    return torch.nn.functional.silu(gate) * up


def rounded_experts(
    x: Tensor, weights: Tensor, ids: Tensor, values: tuple[Tensor, ...], *, by_block: bool
) -> Tensor:
    """Returns what `expected_experts` does, with rows and what is between the products rounded to
    FP8."""
    gate, up, down = values
    out = torch.zeros(x.shape, dtype=torch.double, device=DEVICE)
    for expert in range(len(gate)):
        row, choice = (ids == expert).nonzero(as_tuple=True)
        if not len(row):
            continue
        some = rounded(x[row], by_block=by_block)
        hidden = torch.nn.functional.silu(some @ gate[expert].T) * (some @ up[expert].T)
        hidden = rounded(hidden if by_block else hidden.bfloat16(), by_block=by_block)
        out.index_add_(0, row, weights[row, choice, None].double() * (hidden @ down[expert].T))
    return out


def found_experts(
    case: tuple[Tensor, Tensor, Tensor],
    experts: object,
    activation: Activation = "silu",
    *,
    is_deterministic: bool = False,
) -> Tensor:
    """Returns what the back end's own choice of kernel says of x, weights and ids."""
    out, is_whole = run_experts(
        *(*case, experts, activation, None, None, Shapes()),  # type: ignore[arg-type]
        is_deterministic=is_deterministic,
        in_parts=False,
    )
    assert is_whole
    return out
