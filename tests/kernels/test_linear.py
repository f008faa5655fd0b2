"""Products with weights: linear, gated MLP, embedding, in every format and at awkward shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.activations import Activation
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from tests.kernels.cases import (
    CLAMPED,
    assert_close,
    exact,
    exact_gate,
    floats,
    make_biases,
    make_experts,
    make_weight,
)

FORMATS = list(WEIGHT_FORMATS)
TOKENS = (1, 2, 3, 4, 5, 8, 67, 130)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_equals_float64_in_every_format(
    ops: Ops, rng: np.random.Generator, name: str, tokens: int
) -> None:
    weights = [make_weight(name, rows, 512, rng) for rows in (1, 30, 71)]
    x, bias = floats(rng, tokens, 512), floats(rng, 102)
    expected = torch.cat([x.double() @ exact(w).T for w in weights], 1)
    assert_close(ops.linear(x, weights), expected)
    assert_close(ops.linear(x, weights, bias), expected + bias.double())


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 31, 33, 100, 767, 1540, 2999])
def test_linear_takes_any_number_of_columns(
    ops: Ops, rng: np.random.Generator, name: str, cols: int
) -> None:
    weight = make_weight(name, 13, cols, rng)
    for tokens in (1, 3, 4, 9, 66):
        x = floats(rng, tokens, cols)
        assert_close(ops.linear(x, (weight,)), x.double() @ exact(weight).T)


def test_rows_may_lie_at_any_address(ops: Ops, rng: np.random.Generator) -> None:
    values = make_weight("q8_0", 24, 64, rng)
    row_bytes = values.format.row_bytes(64)
    mapped = torch.zeros(1 + 24 * row_bytes, dtype=torch.uint8)
    data = mapped[1:].view(24, row_bytes)
    data.copy_(values.data)
    weight = Weight(data=data, format=values.format, rows=24, cols=64)
    for tokens in (1, 6):
        x = floats(rng, tokens, 64)
        assert torch.equal(ops.linear(x, (weight,)), ops.linear(x, (values,)))


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_returns_the_very_values_of_ggufs_reference(
    ops: Ops, rng: np.random.Generator, name: str
) -> None:
    weight = make_weight(name, 40, 768, rng)
    ids = torch.tensor([39, 0, 7, 7], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, weight).double(), exact(weight)[ids.long()])


def test_a_token_id_beyond_the_vocabulary_is_an_error(ops: Ops, rng: np.random.Generator) -> None:
    weight = make_weight("bf16", 40, 64, rng)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([40], dtype=torch.int32), weight)


def _exact_mlp(
    x: torch.Tensor, weights: tuple[Weight, Weight, Weight], activation: Activation
) -> torch.Tensor:
    gate, up, down = (exact(w) for w in weights)
    return exact_gate(x.double() @ gate.T, x.double() @ up.T, activation) @ down.T


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", CLAMPED], ids=str)
@pytest.mark.parametrize("name", ["f32", "bf16", "q4_1"])
def test_gated_mlp_equals_float64(
    ops: Ops, rng: np.random.Generator, name: str, activation: Activation
) -> None:
    gate, up = make_weight(name, 96, 64, rng), make_weight(name, 96, 64, rng)
    down = make_weight(name, 64, 96, rng)
    for tokens in (1, 2, 5, 70):
        x = floats(rng, tokens, 64) * 4
        found = ops.gated_mlp(x, (gate, up), down, activation)
        assert_close(found, _exact_mlp(x, (gate, up, down), activation))


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (3, 2), (8, 2), (60, 4)])
@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0"])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(
    ops: Ops, rng: np.random.Generator, count: int, top_k: int, name: str
) -> None:
    experts = make_experts(rng, name, count, 96)
    for tokens in (1, 6, 40):
        x, weights = floats(rng, tokens, 64), floats(rng, tokens, top_k).abs()
        ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])
        topk_ids = torch.from_numpy(ids).to(torch.int32)
        expected = torch.zeros(tokens, 64, dtype=torch.float64)
        for t in range(tokens):
            for place, e in enumerate(ids[t]):
                chosen = (experts.gate[e], experts.up[e], experts.down[e])
                part = _exact_mlp(x[t : t + 1], chosen, "silu")[0]
                expected[t] += part * weights[t, place].double()
        assert_close(ops.moe(x, weights, topk_ids, experts, "silu"), expected)


def test_experts_that_are_not_here_add_nothing(ops: Ops, rng: np.random.Generator) -> None:
    experts = make_experts(rng, "bf16", 5, 44)
    experts = replace(experts, biases=make_biases(rng, 5, 44, 64))
    for ids in ([[0, 3], [-1, 2], [4, -1], [-1, -1]], [[-1, -1]]):
        x, weights = floats(rng, len(ids), 64), floats(rng, len(ids), 2).abs()
        topk_ids = torch.tensor(ids, dtype=torch.int32)
        here = torch.where(topk_ids < 0, 0.0, weights)
        expected = ops.moe(x, here, topk_ids.clamp(min=0), experts, "silu")
        assert_close(ops.moe(x, weights, topk_ids, experts, "silu"), expected.double())


def test_biased_experts_with_clamps_equal_float64(ops: Ops, rng: np.random.Generator) -> None:
    experts, biases = make_experts(rng, "bf16", 5, 44), make_biases(rng, 5, 44, 64)
    experts = replace(experts, biases=biases)
    for tokens in (1, 40):
        x, weights = floats(rng, tokens, 64) * 3, floats(rng, tokens, 2).abs()
        ids = np.stack([rng.permutation(5)[:2] for _ in range(tokens)])
        expected = torch.zeros(tokens, 64, dtype=torch.float64)
        for t, chosen in enumerate(ids):
            for place, e in enumerate(chosen):
                row = x[t].double()
                gate = exact(experts.gate[e]) @ row + biases.gate_EF[e]
                up = exact(experts.up[e]) @ row + biases.up_EF[e]
                part = exact(experts.down[e]) @ exact_gate(gate, up, CLAMPED) + biases.down_EM[e]
                expected[t] += part * weights[t, place].double()
        topk_ids = torch.from_numpy(ids).to(torch.int32)
        assert_close(ops.moe(x, weights, topk_ids, experts, CLAMPED), expected)


def test_an_expert_id_out_of_range_is_an_error(native: Ops, rng: np.random.Generator) -> None:
    experts = make_experts(rng, "f32", 2, 32)
    ids = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(IndexError):
        native.moe(floats(rng, 1, 64), torch.ones(1, 2), ids, experts, "silu")


def test_a_nan_in_one_row_stays_in_that_row(ops: Ops, rng: np.random.Generator) -> None:
    weight = make_weight("bf16", 50, 64, rng)
    x = floats(rng, 9, 64)
    x[4, 3], x[6, 0] = torch.nan, torch.inf
    found = ops.linear(x, (weight,))
    clean = torch.arange(9) != 4
    clean[6] = False
    assert found[4].isnan().all()
    assert not found[6].isfinite().any()
    assert_close(found[clean], x[clean].double() @ exact(weight).T)
