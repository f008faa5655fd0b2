"""Experts of many tokens on Hopper whose weights are numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.activations import Activation, ClampedSwiGLU
from octavo.kernels.weights import ExpertBiases
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import (
    error_of,
    expected_experts,
    found_experts,
    packed_experts,
    with_biases,
)

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.experts import unpacked  # isort: skip
from octavo.kernels.triton.experts.hopper import many  # isort: skip
from octavo.kernels.triton.experts.sort import sort_pairs  # isort: skip
from octavo.kernels.triton.experts.stacks import StackedExperts  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
EXPERTS, HIDDEN, INNER, TOP_K = 5, 256, 128, 2
CLAMPED = ClampedSwiGLU(alpha=1.7, limit=1.0)
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(count: int) -> Case:
    """Rows of which an expert has none, and one pair goes nowhere."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    likely = torch.rand(count, EXPERTS, generator=generator)
    likely[:, 1] = 0
    weights, ids = likely.topk(TOP_K)
    ids[0, 0] = -1
    return x.to(DEVICE), weights.to(DEVICE), ids.int().to(DEVICE)


def numbers_of(kind: str) -> tuple[StackedExperts, tuple[torch.Tensor, ...]]:
    _, values = packed_experts(kind, kind, EXPERTS, HIDDEN, INNER)
    gate, up, down = (one.bfloat16().to(DEVICE) for one in values)
    made = StackedExperts(gate_EFM=gate, up_EFM=up, down_EMF=down)
    return made, tuple(one.double() for one in (gate, up, down))


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"num_pairs": 512 * EXPERTS - 1}, False),
        ({"least": INNER + 1}, False),
        ({"dtype": torch.float16}, False),
    ],
)
def test_large_experts_of_many_rows_are_taken(
    change: dict[str, object], is_taken: bool, monkeypatch: pytest.MonkeyPatch
):
    case = {"num_pairs": 512 * EXPERTS, "least": INNER, "dtype": torch.bfloat16} | change
    experts, _ = numbers_of("q8_0")
    x = torch.zeros(1, HIDDEN, dtype=case["dtype"], device=DEVICE)
    monkeypatch.setattr(many, "LARGE_INNER", case["least"])
    monkeypatch.setattr(many, "has_wgmma", lambda device: False)
    assert not many.fits(x, experts, case["num_pairs"])
    monkeypatch.setattr(many, "has_wgmma", lambda device: True)
    assert many.fits(x, experts, case["num_pairs"]) == is_taken
    apart = replace(experts, up_EFM=experts.up_EFM.transpose(1, 2).contiguous().transpose(1, 2))
    assert not many.fits(x, apart, case["num_pairs"])


@pytest.mark.parametrize("is_packed", [True, False])
def test_they_run_for_numbers_and_for_what_becomes_numbers(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
):
    experts, _ = (
        packed_experts("q8_0", "q8_0", EXPERTS, HIDDEN, INNER) if is_packed else numbers_of("q8_0")
    )
    case = inputs(513 * EXPERTS // TOP_K)
    firsts: list[int] = []
    monkeypatch.setattr(many, "LARGE_INNER", INNER)
    monkeypatch.setattr(many, "has_wgmma", lambda device: True)
    monkeypatch.setattr(many, "rows_in_order", lambda x, pairs: x)
    monkeypatch.setattr(
        many, "many_gate_up", lambda x, pairs, part, kind, out, first: firsts.append(first)
    )
    monkeypatch.setattr(unpacked, "unpack", lambda *_: None)
    monkeypatch.setattr(
        many, "many_down", lambda x, weights, *_: x.new_ones(weights.numel(), HIDDEN)
    )
    found = found_experts(case, experts)
    assert firsts == ([0, 3] if is_packed else [0])
    assert bool((found[1:] == TOP_K).all()), "parts are added"
    found_experts([one[:900] for one in case], experts)
    assert len(firsts) <= 2, "of few rows others run"


def ran(
    module: object, case: Case, experts: StackedExperts, kind: Activation, parts: int
) -> torch.Tensor:
    """Returns what the kernels of a module say, of gate and up in so many parts."""
    x, weights, ids = case
    pairs = sort_pairs(ids, EXPERTS, 128)
    rows = module.rows_in_order(x, pairs)
    hidden = x.new_full((ids.numel(), INNER), float("nan"))
    at_once = -(-EXPERTS // parts)
    for first in range(0, EXPERTS, at_once):
        some = slice(first, first + at_once)
        biases = experts.biases and ExpertBiases(
            gate_EF=experts.biases.gate_EF[some],
            up_EF=experts.biases.up_EF[some],
            down_EM=experts.biases.down_EM[some],
        )
        part = replace(
            experts, gate_EFM=experts.gate_EFM[some], up_EFM=experts.up_EFM[some], biases=biases
        )
        module.many_gate_up(rows, pairs, part, kind, hidden, first)
    made = module.many_down(hidden, weights, pairs, experts.down_EMF)
    return torch.where((ids >= 0).view(-1, 1), made, 0).view(len(x), TOP_K, -1).float().sum(1)


def with_gate_biases(experts: StackedExperts) -> StackedExperts:
    experts = with_biases(experts)
    assert experts.biases is not None
    none = torch.zeros_like(experts.biases.down_EM)
    return replace(experts, biases=replace(experts.biases, down_EM=none))


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize(("parts", "is_late"), [(2, True), (1, False)])
def test_experts_are_those_of_their_values_without_a_gpu(parts: int, is_late: bool):
    emulator = emulated("octavo.kernels.triton.experts.hopper.many", is_late=is_late)
    emulator.num_processors = lambda device: 2  # so that rings go round
    experts, values = numbers_of("q8_0")
    kind: Activation = "silu"
    if parts == 1:
        experts, kind = with_gate_biases(experts), CLAMPED
    case = inputs(150)
    found = ran(emulator, case, experts, kind, parts)
    assert error_of(found, expected_experts(*case, values, experts.biases, kind)) < 8e-3


@on_hopper
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("count", [3, 300, 2100])
def test_experts_are_those_of_their_values(count: int, parts: int):
    experts, values = numbers_of("q8_0")
    case = inputs(count)
    for kind, some in (("silu", experts), (CLAMPED, with_gate_biases(experts))):
        found = ran(many, case, some, kind, parts)
        assert error_of(found, expected_experts(*case, values, some.biases, kind)) < 8e-3
