"""The experts of a MoE layer against float64: every kernel, every kind of launch shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.kernels.weights import ExpertBiases, ExpertWeights
from tests.kernels.cases import CLAMPED, floats, make_biases
from tests.kernels.triton.cases import (
    TOLERANCES,
    assert_near,
    exact_moe,
    make_experts,
    make_ops,
    make_stack,
    routed,
)
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.experts.dispatch import is_few  # isort: skip
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.shapes import ExpertsShape, TileShape, experts_shape
from octavo.kernels.triton.experts.stacks import stacked_experts


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (3, 2), (60, 4)])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(
    rng: np.random.Generator, count: int, top_k: int, dtype: torch.dtype, is_deterministic: bool
) -> None:
    experts = make_experts(rng, count, 72, 40, dtype)
    for tokens in (1, 3, 40) if is_deterministic else (1, 2):
        x = floats(rng, tokens, 72).to(DEVICE, dtype)
        weights, ids = routed(rng, tokens, count, top_k)
        for activation in ("silu", "gelu_tanh"):
            ops = make_ops(is_deterministic=is_deterministic)
            found = ops.moe(x, weights, ids, experts, activation)
            assert found.dtype is dtype
            expected = exact_moe(x, weights, ids, experts, activation)
            assert_near(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_biased_experts_with_clamps_are_exact(
    rng: np.random.Generator, tokens: int, is_deterministic: bool
) -> None:
    biases = make_biases(rng, 3, 24, 40)
    there = ExpertBiases(
        gate_EF=biases.gate_EF.to(DEVICE),
        up_EF=biases.up_EF.to(DEVICE),
        down_EM=biases.down_EM.to(DEVICE),
    )
    experts = replace(make_experts(rng, 3, 40, 24, torch.float32), biases=there)
    x, (weights, ids) = floats(rng, tokens, 40).to(DEVICE) * 3, routed(rng, tokens, 3, 2)
    ids[-1, 0] = -1
    ops = make_ops(is_deterministic=is_deterministic)
    found = ops.moe(x, weights, ids, experts, CLAMPED, in_parts=True)
    assert_near(found, exact_moe(x, weights, ids, experts, CLAMPED), 2e-6)


def _shapes() -> list[ExpertsShape]:
    """Every kind of launch shape, at block sizes that the interpreter can bear."""
    shapes = [experts_shape(1, 2, 4, 64, can_tma=False), experts_shape(20, 2, 8, 64, can_tma=False)]
    for block_p in (64, 128):
        for tma in (False, True):
            tile = TileShape(block_n=64, block_k=64, group=8, num_warps=4, num_stages=3, tma=tma)
            shapes.append(ExpertsShape(is_direct=False, block_p=block_p, gate_up=tile, down=tile))
    return shapes


@pytest.mark.parametrize("shape", _shapes())
def test_every_shape_of_a_moe_layer_is_right(rng: np.random.Generator, shape: ExpertsShape) -> None:
    experts = make_experts(rng, 4, 136, 72, torch.float16)
    tokens = 40 if shape.block_p == 16 else 150
    x = floats(rng, tokens, 136).to(DEVICE, torch.float16)
    weights, ids = routed(rng, tokens, 4, 2)
    chosen = x, weights, ids, stacked_experts(experts), "silu", shape
    found = grouped_experts(*chosen, is_scanned=False)
    assert_near(found, exact_moe(x, weights, ids, experts), 2e-3)
    if shape.block_p == 16:
        assert is_few(ids)
        assert int(torch.bincount(ids.flatten()).max()) > shape.block_p, "more than a tile"
        assert torch.equal(found, grouped_experts(*chosen, is_scanned=True))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_parts_that_the_next_norm_adds_give_the_bits_of_the_sum(
    rng: np.random.Generator, dtype: torch.dtype
) -> None:
    experts, ops = make_experts(rng, 4, 72, 40, dtype), make_ops()
    for tokens in (1, 2, 40, 80):
        x, residual = (floats(rng, tokens, 72).to(DEVICE, dtype) for _ in range(2))
        weights, ids = routed(rng, tokens, 4, 2)
        norm = floats(rng, 72).to(DEVICE, dtype)
        both = []
        for in_parts in (False, True):
            out = ops.moe(x, weights, ids, experts, "silu", in_parts=in_parts)
            assert out.shape == ((tokens, 2, 72) if in_parts else (tokens, 72))
            added = residual.clone()
            both.append(torch.stack((ops.add_rms_norm(out, added, norm, 1e-6), added)))
        assert torch.equal(*both)


def test_experts_that_live_elsewhere_add_nothing(rng: np.random.Generator) -> None:
    experts = make_experts(rng, 3, 64, 32, torch.float32)
    for tokens in (1, 30):
        x = floats(rng, tokens, 64).to(DEVICE)
        weights, ids = routed(rng, tokens, 6, 3)
        ids[0] = torch.tensor([0, -1, 5])
        for is_deterministic in (True, False):
            ops = make_ops(is_deterministic=is_deterministic)
            found = ops.moe(x, weights, ids, experts, "silu")
            assert_near(found, exact_moe(x, weights, ids, experts), 2e-6)


def test_moe_rows_do_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    experts = make_experts(rng, 5, 64, 96, dtype)
    x = floats(rng, 9, 64).to(DEVICE, dtype)
    weights, ids = routed(rng, 9, 5, 2)
    ops = make_ops()
    rows = zip(x.split(1), weights.split(1), ids.split(1), strict=True)
    alone = [ops.moe(*row, experts, "silu") for row in rows]
    whole = ops.moe(x, weights, ids, experts, "silu")
    if DEVICE == "cuda":
        assert torch.equal(torch.cat(alone), whole)
    else:  # The interpreter multiplies with NumPy, whose order is its own.
        assert_near(torch.cat(alone), whole, 1e-3)


def test_experts_in_separate_tensors_are_refused(rng: np.random.Generator) -> None:
    gate = tuple(make_stack(rng, 1, 8, 16, torch.float32)[0] for _ in range(3))
    experts = ExpertWeights(gate=gate, up=gate, down=gate)
    weights, ids = routed(rng, 2, 3, 2)
    with pytest.raises(AssertionError, match=r"expert 1 of 3 .*one \[E, rows, cols\] stack"):
        make_ops().moe(floats(rng, 2, 16).to(DEVICE), weights, ids, experts, "silu")


def test_the_launch_shape_is_a_pure_function_of_the_sizes() -> None:
    def kind(tokens: int, top_k: int, count: int, inner: int) -> int:
        shape = experts_shape(tokens, top_k, count, inner, can_tma=True)
        assert shape == experts_shape(tokens, top_k, count, inner, can_tma=True)
        for tile in (shape.gate_up, shape.down):
            stage = (tile.block_n * 2 + shape.block_p) * tile.block_k * 2
            assert tile is shape.down or stage * tile.num_stages <= 227 << 10
            assert not tile.tma or shape.block_p == 128
        return 1 if shape.is_direct else shape.block_p

    tokens = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
    assert [kind(t, 8, 128, 768) for t in tokens] == [1, 1, *[16] * 6, 64, 128, 128]
    assert [kind(t, 4, 60, 1408) for t in tokens] == [1, *[16] * 7, 64, 128, 128]
    assert [kind(t, 2, 8, 14336) for t in tokens] == [1, *[16] * 5, 32, 64, 128, 128, 128]
    assert kind(1, 1, 1, 64) == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: graphs cannot be captured")
@pytest.mark.parametrize("tokens", [1, 32, 600])
def test_a_captured_moe_layer_follows_new_routes(rng: np.random.Generator, tokens: int) -> None:
    experts, ops = make_experts(rng, 8, 256, 128, torch.bfloat16), make_ops()
    x = floats(rng, tokens, 256).to(DEVICE, torch.bfloat16)
    weights, ids = routed(rng, tokens, 8, 2)
    ops.moe(x, weights, ids, experts, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.moe(x, weights, ids, experts, "silu")
    weights_2, ids_2 = routed(rng, tokens, 8, 2)
    weights.copy_(weights_2)
    ids.copy_(ids_2)
    graph.replay()
    assert torch.equal(out, ops.moe(x, weights, ids, experts, "silu"))
