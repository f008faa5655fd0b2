"""Routing on the device: the best experts, equal ones, NaN and padding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import NormInput
from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import Router, Weight
from tests.kernels.cases import floats, plain_router
from tests.kernels.triton.cases import assert_near, make_ops
from tests.kernels.triton.interpreter import DEVICE


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (3, 3), (8, 2), (60, 4), (128, 8)])
def test_route_takes_the_best_experts(
    rng: np.random.Generator, count: int, top_k: int, renormalize: bool
) -> None:
    logits = floats(rng, 33, count).to(DEVICE) * 2
    counts = torch.ones(count + 1, dtype=torch.int32, device=DEVICE)
    weights, ids = make_ops().route(logits, plain_router(top_k, renormalize), counts)
    assert torch.equal(counts - 1, torch.bincount(ids.flatten(), minlength=count + 1))
    expected, chosen = logits.double().softmax(-1).topk(top_k, -1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.dtype is torch.int32
    assert torch.equal(ids.long(), chosen)
    assert_near(weights, expected, 1e-6)
    for row in range(3):
        one, _ = make_ops().route(logits[row : row + 1], plain_router(top_k, renormalize), counts)
        assert torch.equal(one[0], weights[row])


def test_padding_is_routed_nowhere_and_not_counted(rng: np.random.Generator) -> None:
    logits, counts = floats(rng, 9, 5).to(DEVICE), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    live = torch.tensor([6], dtype=torch.int32, device=DEVICE)
    _, ids = make_ops().route(logits, plain_router(2), counts, live)
    assert (ids[6:] == -1).all()
    assert (ids[:6] >= 0).all()
    assert int(counts.sum()) == 12


def test_experts_of_other_ranks_are_counted_but_not_here(rng: np.random.Generator) -> None:
    logits = floats(rng, 9, 8).to(DEVICE)
    live = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    matrix = floats(rng, 8, 24).to(DEVICE)
    weight = Weight(data=matrix, format=WEIGHT_FORMATS["f32"], rows=8, cols=24)
    rows = NormInput(
        x_TM=None,
        residual_TM=floats(rng, 1, 24).to(DEVICE),
        weight_M=torch.ones(24, device=DEVICE),
        eps=1e-6,
    )
    for rule in (
        RoutingRule(top_k=3, renormalize=True),
        RoutingRule(top_k=3, score="sigmoid", renormalize=True, sum_epsilon=1e-20),
    ):
        router = Router(weights=(weight,), rule=rule)
        counts = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
        expected, all_ids = make_ops().route(logits, router, counts[0], live)
        for held in (range(4), range(4, 8)):
            part = replace(router, held=held)
            found, ids = make_ops().route(logits, part, counts[1].zero_(), live)
            assert torch.equal(found, expected)
            assert torch.equal(*counts)
            assert torch.equal(ids, part.held_ids(all_ids).where(all_ids >= 0, -1))
            ops = make_ops(is_deterministic=False)
            lone = ops.norm_route(rows, part, torch.zeros_like(counts[0])).topk_ids
            whole = ops.norm_route(rows, router, torch.zeros_like(counts[0])).topk_ids
            assert torch.equal(lone, part.held_ids(whole))


def test_route_takes_the_lower_of_equal_experts_and_knows_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [math.nan] * 5], device=DEVICE)
    weights, ids = make_ops().route(
        logits, plain_router(4), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    )
    assert ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert weights[0, 0] == weights[0, 1]
    assert weights[1].isnan().all()
