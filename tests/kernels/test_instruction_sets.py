"""Every instruction set that this machine has gives the bits of the plainest one, but for products
of bfloat16 weights with rounded activations, which keep to bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.cpu.library import ISAS, load_library, supported_isas, unfit_reason
from octavo.kernels.cpu.native import NativeOps
from octavo.kernels.registry import Needs, select_ops
from octavo.kernels.weights import Weight
from tests.kernels.cases import (
    assert_close,
    attention_op,
    exact_gate,
    floats,
    make_experts,
    make_paged,
    make_weight,
)

TOKENS = (*range(1, 10), 13, 16, 18, 67)


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
    if both[1].isa == "avx512_bf16" and name == "bf16":
        pytest.skip("activations are rounded")
    for tokens in TOKENS:
        x = floats(rng, tokens, 512)
        assert torch.equal(*(ops.linear(x, weights) for ops in both))


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 100, 1030, 2999])
def test_odd_columns_have_the_same_bits(
    both: tuple[NativeOps, NativeOps], rng: np.random.Generator, cols: int
) -> None:
    names = ("f32", "f16") if both[1].isa == "avx512_bf16" else ("f32", "f16", "bf16")
    weights = [make_weight(name, 13, cols, rng) for name in names]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "size"), [((6, 2), 64), ((7, 1), 80), ((4, 4), 24)])
def test_attention_has_the_same_bits(
    both: tuple[NativeOps, NativeOps],
    rng: np.random.Generator,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
) -> None:
    num_heads, num_kv_heads = heads
    paged = make_paged(rng, [330, 70, 9], (num_kv_heads, size), dtype=dtype)
    sinks, scale = floats(rng, num_heads), 2 * size**-0.5
    for op in (
        attention_op(num_heads, paged.layer, scale),
        attention_op(num_heads, paged.layer, scale, 50, sinks_H=sinks),
        attention_op(num_heads, paged.layer, 40 * scale, soft_cap=30.0),
        attention_op(num_heads, paged.layer, 40 * scale),
    ):
        for query_lens in ([330, 70, 9], [1, 2, 5], [64, 17, 1]):
            batch = paged.batch([330, 70, 9], query_lens)
            q = floats(rng, sum(query_lens), num_heads, size)
            assert torch.equal(*(ops.attention(q, op, paged.layer, batch) for ops in both))


@pytest.fixture
def rounding() -> NativeOps:
    if reason := unfit_reason():
        pytest.skip(reason)
    if "avx512_bf16" not in supported_isas(load_library()):
        pytest.skip("this CPU has no avx512_bf16")
    return NativeOps(2, "avx512_bf16")


def exact_rounded(x: Tensor, weight: Weight) -> Tensor:
    return x.bfloat16().double() @ weight.data.double().T


@pytest.mark.parametrize("cols", [1, 31, 32, 100, 1030, 2999])
def test_rounded_activations_are_the_only_loss(
    rounding: NativeOps, rng: np.random.Generator, cols: int
) -> None:
    weights = [make_weight("bf16", rows, cols, rng) for rows in (1, 24, 45)]
    whole = floats(rng, 131, cols)
    expected = torch.cat([exact_rounded(whole, weight) for weight in weights], 1)
    alone = torch.cat([rounding.linear(row, weights) for row in whole.split(1)])
    assert_close(alone, expected)
    for cut in ([131], [2, 3, 126], [64, 67], [4, 127]):
        parts = [rounding.linear(x, weights) for x in whole.split(cut)]
        assert torch.equal(torch.cat(parts), alone)


def test_what_lies_behind_a_row_is_not_multiplied(
    rounding: NativeOps, rng: np.random.Generator
) -> None:
    weight = make_weight("bf16", 13, 40, rng)
    wide = torch.full((13, 64), float("nan"), dtype=torch.bfloat16)
    wide[:, :40] = weight.data
    inside = replace(weight, data=wide[:, :40])
    for tokens in (1, 7):
        x = floats(rng, tokens, 40)
        assert torch.equal(rounding.linear(x, (inside,)), rounding.linear(x, (weight,)))


def test_mlp_and_experts_round_what_they_multiply(
    rounding: NativeOps, rng: np.random.Generator
) -> None:
    experts = make_experts(rng, "bf16", 3, 96)
    exactly = NativeOps(1, "avx2")
    x, weights = floats(rng, 40, 64), floats(rng, 40, 2)
    ids = torch.stack([torch.from_numpy(rng.permutation(3)[:2]) for _ in range(40)])
    found = rounding.moe(x, weights, ids.int(), experts, "silu")
    expected = exactly.moe(x, weights, ids.int(), experts, "silu")
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.01 * expected.norm()
    gate, up, down = experts.gate[0], experts.up[0], experts.down[0]
    hidden = exact_gate(exact_rounded(x, gate), exact_rounded(x, up), "silu").float()
    mlp = rounding.gated_mlp(x, (gate, up), down, "silu")
    assert (mlp - exact_rounded(hidden, down)).norm() < 0.002 * mlp.norm()
    alone = [rounding.gated_mlp(row, (gate, up), down, "silu") for row in x.split(1)]
    assert torch.equal(torch.cat(alone), mlp)


def test_activations_are_rounded_only_if_that_is_asked_for() -> None:
    if reason := unfit_reason():
        pytest.skip(reason)
    assert NativeOps(1).isa != "avx512_bf16"
    assert select_ops("native", Needs(rounds_activations=True)).name == "native"
    faster = bool(load_library().octavo_prefers_bf16())
    assert (NativeOps(1, rounds_activations=True).isa == "avx512_bf16") == faster


def test_an_instruction_set_that_the_cpu_lacks_is_refused() -> None:
    if reason := unfit_reason():
        pytest.skip(reason)
    with pytest.raises(AssertionError, match="no sse9"):
        NativeOps(1, "sse9")
