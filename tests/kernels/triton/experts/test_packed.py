"""Experts with packed weights equal those with the values that their planes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import (
    FLOAT_ERROR,
    error_of,
    expected_experts,
    found_experts,
    packed_experts,
    with_biases,
)

from octavo.kernels.activations import ClampedSwiGLU  # isort: skip
from octavo.kernels.triton.experts import choose_packed, unpacked  # isort: skip

CLAMPED = ClampedSwiGLU(alpha=1.7, limit=1.0)
COUNT, HIDDEN, INNER, TOP_K = 3, 96, 64, 2


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, HIDDEN, generator=generator) * 0.3
    order = [torch.randperm(COUNT, generator=generator)[:TOP_K] for _ in range(count)]
    ids = torch.stack(order).int()
    ids[-1, 0] = -1
    weights = torch.rand(count, TOP_K, generator=generator)
    return x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)


ALL = (
    *(("int4_64_f16", "q4_1"), ("fp8_row", "fp8"), ("mxfp4", "q8_0"), ("q4_k", "q6_k")),
    *(("nvfp4", "iq4_xs"), ("q5_k", "q3_k")),
)


@pytest.mark.parametrize(
    ("formats", "count"), [*((one, 1) for one in ALL[:4]), *((one, 4) for one in ALL)]
)
def test_packed_experts_equal_float64(formats: tuple[str, str], count: int):
    experts, values = packed_experts(*formats, COUNT, HIDDEN, INNER)
    case = inputs(count)
    assert error_of(found_experts(case, experts), expected_experts(*case, values)) < FLOAT_ERROR


@pytest.mark.parametrize(("formats", "parts"), [(("q8_0", "mxfp4"), 1), (("mxfp4", "q4_1"), 2)])
def test_experts_are_unpacked_in_parts(
    monkeypatch: pytest.MonkeyPatch, formats: tuple[str, str], parts: int
):
    case = inputs(12)
    experts, values = packed_experts(*formats, COUNT, HIDDEN, INNER)
    experts = with_biases(experts)
    monkeypatch.setattr(choose_packed, "unpacks_experts", lambda num_pairs, *_: num_pairs > 3)
    monkeypatch.setattr(unpacked, "UNPACKED_PARTS", parts)
    expected = expected_experts(*case, values, experts.biases, CLAMPED)
    assert error_of(found_experts(case, experts, CLAMPED), expected) < FLOAT_ERROR


def test_many_tokens_are_sorted_unpacked_or_rounded_to_fp8(monkeypatch: pytest.MonkeyPatch):
    case = inputs(12)
    experts, values = packed_experts("int4_64_f16", "int4_64_f16", COUNT, HIDDEN, INNER)
    monkeypatch.setattr(choose_packed, "unpacks_experts", lambda num_pairs, *_: num_pairs > 3)
    assert error_of(found_experts(case, experts), expected_experts(*case, values)) < FLOAT_ERROR
    experts, values = packed_experts("fp8_row", "fp8_row", COUNT, HIDDEN, INNER)
    monkeypatch.setattr(choose_packed, "FP8_ROWS", 1)
    assert 1e-3 < error_of(found_experts(case, experts), expected_experts(*case, values)) < 6e-2
    exact = found_experts(case, experts, is_deterministic=True)
    assert error_of(exact, expected_experts(*case, values)) < FLOAT_ERROR
