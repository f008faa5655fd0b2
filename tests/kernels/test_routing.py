"""Every rule of routing on the CPU's back ends: as transformers' routers, and as the rule says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import NormInput
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Router
from tests.kernels.cases import assert_close, floats, make_weight
from tests.kernels.routing_cases import CASES, RULES, dense, exact_routes, run_module


@pytest.mark.parametrize("case", CASES)
def test_a_rule_routes_as_the_familys_router(ops: Ops, case: str) -> None:
    expected = run_module(case, 50)
    counts = torch.zeros(12, dtype=torch.int64)
    weights, ids = ops.route(expected.logits_TE, expected.router, counts)
    chosen = expected.ids_TK.sort(-1).values
    assert torch.equal(ids.sort(-1).values.long(), chosen)
    assert torch.equal(counts, torch.bincount(chosen.flatten(), minlength=12))
    assert_close(dense(weights, ids, 12), dense(expected.weights_TK, expected.ids_TK, 12))


@pytest.mark.parametrize("has_tensors", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_is_chosen_and_what_it_weighs(
    ops: Ops, rng: np.random.Generator, rule: str, has_tensors: bool
) -> None:
    logits, correction, scale = floats(rng, 40, 21) * 3, floats(rng, 21), floats(rng, 21)
    router = Router(weights=(), rule=RULES[rule])
    if has_tensors:
        router = Router(weights=(), rule=RULES[rule], correction_E=correction, scale_E=scale)
    weights, ids = ops.route(logits, router, torch.zeros(21, dtype=torch.int64))
    assert_close(dense(weights, ids, 21), exact_routes(logits, router))
    for t in range(3):
        one, one_ids = ops.route(logits[t : t + 1], router, torch.zeros(21, dtype=torch.int64))
        assert torch.equal(one_ids[0], ids[t])
        if ops.name == "native":
            assert torch.equal(one[0], weights[t])


@pytest.mark.parametrize("rule", RULES)
def test_a_row_of_nan_takes_the_first_experts(native: Ops, rule: str) -> None:
    router = Router(weights=(), rule=RULES[rule])
    counts = torch.zeros(21, dtype=torch.int64)
    _, ids = native.route(torch.full((2, 21), math.nan), router, counts)
    assert ids.tolist() == [list(range(router.rule.top_k))] * 2


@pytest.mark.parametrize("rule", ["sigmoid", "late softmax"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_the_routers_bias_is_added_to_the_experts_logits_alone(
    ops: Ops, rng: np.random.Generator, rule: str, has_gate: bool
) -> None:
    weights = [make_weight("f32", rows, 32, rng) for rows in ((21, 1) if has_gate else (21,))]
    bias, x, norm = floats(rng, 21), floats(rng, 6, 32), floats(rng, 32)
    router = Router(weights=tuple(weights), rule=RULES[rule], bias_E=bias)
    rows = NormInput(x_TM=None, residual_TM=x, weight_M=norm, eps=1e-6)
    routed = ops.norm_route(rows, router, torch.zeros(21, dtype=torch.int64))
    normed = ops.rms_norm(x, norm, 1e-6)
    logits = normed @ weights[0].data.T + bias
    found = dense(routed.topk_weights, routed.topk_ids, 21)
    assert_close(found, exact_routes(logits, router), 1e-4)
    if has_gate:
        assert routed.gate_T1 is not None
        assert_close(routed.gate_T1, (normed @ weights[1].data.T).double(), 1e-4)
