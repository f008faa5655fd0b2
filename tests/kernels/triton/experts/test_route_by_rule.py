"""Every rule of routing through Triton: on a GPU where there is one, else its interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import NormInput
from octavo.kernels.weights import Router
from tests.kernels.cases import assert_close, floats, make_weight
from tests.kernels.routing_cases import CASES, RULES, dense, exact_routes, run_module
from tests.kernels.triton.cases import make_ops
from tests.kernels.triton.interpreter import DEVICE


def there(router: Router) -> Router:
    correction, scale = (
        None if tensor is None else tensor.to(DEVICE)
        for tensor in (router.correction_E, router.scale_E)
    )
    return replace(router, correction_E=correction, scale_E=scale)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_routes_as_the_familys_router(case: str) -> None:
    expected = run_module(case, 9)
    counts = torch.zeros(12, dtype=torch.int32, device=DEVICE)
    weights, ids = make_ops().route(expected.logits_TE.to(DEVICE), there(expected.router), counts)
    chosen = expected.ids_TK.sort(-1).values
    assert torch.equal(ids.cpu().sort(-1).values.long(), chosen)
    assert torch.equal(counts.cpu(), torch.bincount(chosen.flatten(), minlength=12).int())
    assert_close(dense(weights, ids, 12), dense(expected.weights_TK, expected.ids_TK, 12))


@pytest.mark.parametrize("has_tensors", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_is_chosen_and_what_it_weighs(
    rng: np.random.Generator, rule: str, has_tensors: bool
) -> None:
    logits, correction, scale = floats(rng, 7, 21) * 3, floats(rng, 21), floats(rng, 21)
    router = Router(weights=(), rule=RULES[rule])
    if has_tensors:
        router = replace(router, correction_E=correction, scale_E=scale)
    counts = torch.zeros(21, dtype=torch.int32, device=DEVICE)
    live = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    weights, ids = make_ops().route(logits.to(DEVICE), there(router), counts, live)
    assert (ids[5:] == -1).all()
    assert int(counts.sum()) == 5 * router.rule.top_k
    expected = exact_routes(logits[:5], router)
    assert_close(dense(weights[:5], ids[:5], 21), expected)
    counts.zero_()
    one, _ = make_ops().route(logits[1:2].to(DEVICE), there(router), counts)
    assert torch.equal(one[0], weights[1])


@pytest.mark.parametrize("rule", RULES)
def test_equal_experts_and_nan_are_taken_in_order(rule: str) -> None:
    router = Router(weights=(), rule=RULES[rule])
    logits = torch.stack((torch.full((21,), math.nan), torch.zeros(21))).to(DEVICE)
    counts = torch.zeros(21, dtype=torch.int32, device=DEVICE)
    _, ids = make_ops().route(logits, router, counts)
    assert ids.tolist() == [list(range(router.rule.top_k))] * 2


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_row_alone_is_routed_by_every_rule(
    rng: np.random.Generator, num_tokens: int, is_exact: bool
) -> None:
    """The kernel that norms, multiplies and routes in one knows the plain rule alone."""
    weight = make_weight("f32", 21, 32, rng)
    weight = replace(weight, data=weight.data.to(DEVICE))
    rule = replace(RULES["seven of three groups"], float32_logits=is_exact)
    bias, correction = floats(rng, 21).to(DEVICE), floats(rng, 21).to(DEVICE)
    router = Router(weights=(weight,), rule=rule, bias_E=bias, correction_E=correction)
    x, norm = floats(rng, num_tokens, 32).to(DEVICE), floats(rng, 32).to(DEVICE)
    ops = make_ops(is_deterministic=False)
    logits = (ops.rms_norm(x, norm, 1e-6) @ weight.data.T + bias).cpu()
    rows = NormInput(x_TM=None, residual_TM=x, weight_M=norm, eps=1e-6)
    counts = torch.zeros(21, dtype=torch.int32, device=DEVICE)
    routed = ops.norm_route(rows, router, counts)
    found = dense(routed.topk_weights, routed.topk_ids, 21)
    assert_close(found, exact_routes(logits, router), 1e-4)
