"""Dense products against float64: every kernel, every kind of launch shape."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.weights import Weight
from tests.kernels.cases import floats, make_weight
from tests.kernels.triton.cases import (
    NAMES,
    TOLERANCES,
    assert_near,
    exact_mlp,
    exact_moe,
    make_experts,
    make_ops,
    make_stack,
    routed,
)
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.product.linear import product  # isort: skip
from octavo.kernels.triton.experts.pairs import down_and_combine, gate_up_of_pairs
from octavo.kernels.triton.experts.stacks import stacked_experts
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.matvec import matvec
from octavo.kernels.triton.product.shapes import RowsShape, product_shape


def test_logits_are_float32(rng: np.random.Generator) -> None:
    x, weight = floats(rng, 3, 32).to(DEVICE).half(), make_weight("f16", 50, 32, rng)
    weight = Weight(data=weight.data.to(DEVICE), format=weight.format, rows=50, cols=32)
    found = make_ops().logits(x, weight)
    assert found.dtype is torch.float32
    assert_near(found, x.double() @ weight.data.double().T, 1e-3)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_linear_equals_float64(
    rng: np.random.Generator, dtype: torch.dtype, is_deterministic: bool
) -> None:
    ops = make_ops(is_deterministic=is_deterministic)
    stack = make_stack(rng, 2, 30, 72, dtype)
    whole = (floats(rng, 50, 72) / 8).to(DEVICE, dtype)
    form = WEIGHT_FORMATS[NAMES[dtype]]
    parts = [Weight(data=p, format=form, rows=len(p), cols=72) for p in whole.split([19, 31])]
    bias = floats(rng, 110).to(DEVICE)
    for tokens in (1, 16, 17, 70):
        x = floats(rng, tokens, 72).to(DEVICE, dtype)
        weights = [stack[0], *parts, stack[1]]
        expected = torch.cat([x.double() @ w.data.double().T for w in weights], 1)
        assert_near(ops.linear(x, weights), expected, TOLERANCES[dtype])
        assert_near(ops.linear(x, weights, bias), expected + bias.double(), TOLERANCES[dtype])
        assert_near(ops.linear(x, (weights[0],)), expected[:, :30], TOLERANCES[dtype])


def test_float32_rows_meet_bf16_weights(rng: np.random.Generator) -> None:
    weight = make_stack(rng, 1, 30, 72, torch.bfloat16)[0]
    x = floats(rng, 5, 72).to(DEVICE)
    found = make_ops(is_deterministic=False).linear(x, (weight,))
    assert_near(found, x.double() @ weight.data.double().T, 2e-6)


@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_every_shape_of_a_dense_product_is_right(rng: np.random.Generator, tokens: int) -> None:
    weight = (floats(rng, 300, 136) / 12).to(DEVICE, torch.float16)
    x = floats(rng, tokens, 136).to(DEVICE, torch.float16)
    for tma in (False, True):
        out = torch.full((tokens, 300), math.nan, dtype=torch.float16, device=DEVICE)
        product(x, weight, None, out, product_shape(tokens, 300, can_tma=tma))
        assert_near(out, x.double() @ weight.double().T, 2e-3)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_a_sum_in_parts_is_right(rng: np.random.Generator, splits: int) -> None:
    weight = (floats(rng, 70, 530) / 12).to(DEVICE, torch.float16)
    x, bias = floats(rng, 20, 530).to(DEVICE, torch.float16), floats(rng, 70).to(DEVICE)
    shape = replace(product_shape(20, 70, can_tma=False), block_k=64, splits=splits)
    tickets = make_tickets(x.device)
    for _ in range(2):  # the tickets of the first are free again
        out = torch.full((20, 70), math.nan, dtype=torch.float16, device=DEVICE)
        product(x, weight, bias, out, shape, tickets)
        assert_near(out, x.double() @ weight.double().T + bias.double(), 2e-3)
    assert not tickets.any()


def test_only_without_determinism_sums_are_in_parts(rng: np.random.Generator) -> None:
    (weight,) = make_stack(rng, 1, 60, 700, torch.bfloat16)
    x = floats(rng, 70, 700).to(DEVICE, torch.bfloat16)
    ops = make_ops(is_deterministic=True)
    assert product_shape(20, 60, can_tma=False).splits > 1
    assert torch.equal(ops.linear(x[:20], (weight,)), ops.linear(x, (weight,))[:20])


@pytest.mark.parametrize("numbers", [(1, 64, 1), (4, 256, 4), (16, 32, 2)])
def test_every_shape_for_one_row_is_right(
    rng: np.random.Generator, numbers: tuple[int, int, int]
) -> None:
    shape = RowsShape(block_n=numbers[0], block_k=numbers[1], num_warps=numbers[2])
    experts = make_experts(rng, 4, 136, 72, torch.float16)
    x = floats(rng, 2, 136).to(DEVICE, torch.float16)
    out = torch.full((1, 72), math.nan, dtype=torch.float32, device=DEVICE)
    weight = experts.up[2].data
    matvec(x[:1], weight, None, out, shape)
    assert_near(out, x[:1].double() @ weight.double().T, 1e-6)
    weights, ids = routed(rng, 2, 4, 3)
    stacked = stacked_experts(experts)
    hidden = gate_up_of_pairs(x, ids, stacked, "silu", shape)
    found = down_and_combine(hidden, weights, ids, stacked, shape)
    assert_near(found, exact_moe(x, weights, ids, experts), 2e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_gated_mlp_equals_float64(
    rng: np.random.Generator, dtype: torch.dtype, activation: str
) -> None:
    gate, up = make_stack(rng, 2, 96, 64, dtype)
    down = make_stack(rng, 1, 64, 96, dtype)[0]
    x = floats(rng, 5, 64).to(DEVICE, dtype)
    found = make_ops().gated_mlp(x, (gate, up), down, activation)
    expected = exact_mlp(x, gate.data, up.data, down.data, activation)
    assert_near(found, expected, TOLERANCES[dtype])
