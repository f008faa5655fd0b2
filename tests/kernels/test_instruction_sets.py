"""Every instruction set that this machine has gives the bits of the plainest one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.cpu.library import ISAS, load_library, supported_isas, unfit_reason
from octavo.kernels.cpu.native import NativeOps
from tests.kernels.cases import floats, make_weight
from tests.kernels.test_linear import make_experts

TOKENS = (1, 2, 3, 4, 5, 18, 67)


@pytest.fixture(params=list(ISAS)[1:])
def both(request: pytest.FixtureRequest) -> tuple[NativeOps, NativeOps]:
    if reason := unfit_reason():
        pytest.skip(reason)
    if request.param not in supported_isas(load_library()):
        pytest.skip(f"this CPU has no {request.param}")
    return NativeOps(2, "avx2"), NativeOps(1, request.param)


@pytest.mark.parametrize("name", list(WEIGHT_FORMATS))
def test_products_have_the_same_bits(
    both: tuple[NativeOps, NativeOps], rng: np.random.Generator, name: str
) -> None:
    weights = [make_weight(name, rows, 512, rng) for rows in (1, 24, 45)]
    for tokens in TOKENS:
        x = floats(rng, tokens, 512)
        assert torch.equal(*(ops.linear(x, weights) for ops in both))


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 100, 1030, 2999])
def test_odd_columns_have_the_same_bits(
    both: tuple[NativeOps, NativeOps], rng: np.random.Generator, cols: int
) -> None:
    weights = [make_weight(name, 13, cols, rng) for name in ("f32", "f16", "bf16")]
    for tokens in TOKENS:
        x = floats(rng, tokens, cols)
        assert torch.equal(*(ops.linear(x, weights) for ops in both))


def test_experts_have_the_same_bits(
    both: tuple[NativeOps, NativeOps], rng: np.random.Generator
) -> None:
    experts = make_experts(rng, "q4_1", 4, 96)
    x, weights = floats(rng, 30, 64), floats(rng, 30, 2)
    ids = torch.from_numpy(rng.integers(0, 4, (30, 2))).to(torch.int32)
    assert torch.equal(*(ops.moe(x, weights, ids, experts, "silu") for ops in both))


def test_an_instruction_set_that_the_cpu_lacks_is_refused() -> None:
    if reason := unfit_reason():
        pytest.skip(reason)
    with pytest.raises(AssertionError, match="no sse9"):
        NativeOps(1, "sse9")
