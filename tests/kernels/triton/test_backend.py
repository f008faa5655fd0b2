"""The Triton ops against float64: on a GPU where there is one, else through the interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.weights import ExpertWeights, Weight
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

from octavo.kernels.triton.product import linear, matvec  # isort: skip
from octavo.kernels.triton.experts import moe, route  # isort: skip
from octavo.kernels.triton.backend import stacked_view
from octavo.kernels.triton.experts.moe_few import is_few, moe_of_few
from octavo.kernels.triton.experts.moe_plan import Launch, MoePlan, plan_moe
from octavo.kernels.triton.launching.tickets import make_tickets


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (3, 3), (8, 2), (60, 4), (128, 8)])
def test_route_takes_the_best_experts(
    rng: np.random.Generator, count: int, top_k: int, renormalize: bool
) -> None:
    logits = floats(rng, 33, count).to(DEVICE) * 2
    counts = torch.ones(count + 1, dtype=torch.int32, device=DEVICE)
    weights, ids = make_ops().route(logits, top_k, "softmax", renormalize, counts)
    assert torch.equal(counts - 1, torch.bincount(ids.flatten(), minlength=count + 1))
    expected, chosen = logits.double().softmax(-1).topk(top_k, -1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.dtype is torch.int32
    assert torch.equal(ids.long(), chosen)
    assert_near(weights, expected, 1e-6)
    for row in range(3):
        one, _ = make_ops().route(logits[row : row + 1], top_k, "softmax", renormalize, counts)
        assert torch.equal(one[0], weights[row])


def test_padding_is_routed_nowhere_and_not_counted(rng: np.random.Generator) -> None:
    logits, counts = floats(rng, 9, 5).to(DEVICE), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    live = torch.tensor([6], dtype=torch.int32, device=DEVICE)
    _, ids = make_ops().route(logits, 2, "softmax", True, counts, live)
    assert (ids[6:] == -1).all()
    assert (ids[:6] >= 0).all()
    assert int(counts.sum()) == 12


@pytest.mark.parametrize("has_gate", [True, False])
def test_add_gated_adds_in_place(rng: np.random.Generator, has_gate: bool) -> None:
    out, x, gate = (floats(rng, 5, n).to(DEVICE) for n in (1100, 1100, 1))
    expected = out.double() + x.double() * (torch.sigmoid(gate.double()) if has_gate else 1)
    make_ops().add_gated(out, x, gate if has_gate else None)
    assert_near(out, expected, 1e-6)


def test_logits_are_float32(rng: np.random.Generator) -> None:
    x, weight = floats(rng, 3, 32).to(DEVICE).half(), make_weight("f16", 50, 32, rng)
    weight = Weight(data=weight.data.to(DEVICE), format=weight.format, rows=50, cols=32)
    found = make_ops().logits(x, weight)
    assert found.dtype is torch.float32
    assert_near(found, x.double() @ weight.data.double().T, 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # The interpreter's NumPy.
def test_route_takes_the_lower_of_equal_experts_and_knows_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [math.nan] * 5], device=DEVICE)
    weights, ids = make_ops().route(
        logits, 4, "softmax", True, torch.zeros(5, dtype=torch.int32, device=DEVICE)
    )
    assert ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert weights[0, 0] == weights[0, 1]
    assert weights[1].isnan().all()


@pytest.mark.parametrize(
    ("tokens", "count", "top_k"), [(1, 1, 1), (5, 3, 2), (64, 60, 4), (300, 5, 3), (40, 130, 8)]
)
def test_pairs_are_sorted_by_expert_into_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, count: int, top_k: int
) -> None:
    _, ids = routed(rng, tokens, count, top_k)
    ids[0, 0], ids[-1, -1] = -1, 10**6
    for max_chunks, uncounted in ((3, 0), (3, 1024), (128, 1024)):
        monkeypatch.setattr(route, "MAX_CHUNKS", max_chunks)
        monkeypatch.setattr(route, "UNCOUNTED_PAIRS", uncounted)
        assert_sorted(route.sort_pairs(ids, count, 16), ids, count)


def assert_sorted(pairs: route.SortedPairs, ids: Tensor, count: int) -> None:
    chosen = ids.flatten().cpu()
    is_known = (chosen >= 0) & (chosen < count)
    expected = torch.argsort(chosen.masked_fill(~is_known, count), stable=True)
    kept = int(is_known.sum())
    assert torch.equal(pairs.order_P[:kept].cpu().long(), expected[:kept])
    expert, first, end = pairs.blocks_3B.cpu()
    covered = 0
    for e, a, b in zip(expert.tolist(), first.tolist(), end.tolist(), strict=True):
        if e < 0:
            continue
        assert a == covered
        assert 0 < b - a <= 16
        assert (chosen[expected[a:b]] == e).all()
        covered = b
    assert covered == kept


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


def _plans() -> list[MoePlan]:
    """Every kind of plan, at block sizes that the interpreter can bear."""
    plans = [plan_moe(1, 2, 4, 64, can_tma=False), plan_moe(20, 2, 8, 64, can_tma=False)]
    for block_p in (64, 128):
        for tma in (False, True):
            launch = Launch(block_n=64, block_k=64, group=8, num_warps=4, num_stages=3, tma=tma)
            plans.append(MoePlan(is_direct=False, block_p=block_p, gate_up=launch, down=launch))
    return plans


@pytest.mark.parametrize("plan", _plans())
def test_every_plan_of_a_moe_layer_is_right(rng: np.random.Generator, plan: MoePlan) -> None:
    experts = make_experts(rng, 4, 136, 72, torch.float16)
    tokens = 40 if plan.block_p == 16 else 150
    x = floats(rng, tokens, 136).to(DEVICE, torch.float16)
    weights, ids = routed(rng, tokens, 4, 2)
    stacks = [stacked_view(w) for w in (experts.gate, experts.up, experts.down)]
    stacked = moe.StackedExperts(gate_EFM=stacks[0], up_EFM=stacks[1], down_EMF=stacks[2])
    found = moe.run_moe(x, weights, ids, stacked, "silu", plan)
    assert_near(found, exact_moe(x, weights, ids, experts), 2e-3)
    if plan.block_p == 16:
        assert is_few(ids)
        assert int(torch.bincount(ids.flatten()).max()) > plan.block_p, "more than a tile"
        assert torch.equal(found, moe_of_few(x, weights, ids, stacked, "silu", plan))


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


def test_block_formats_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    data = torch.zeros(8, 34, dtype=torch.uint8)
    weight = Weight(data=data, format=WEIGHT_FORMATS["q8_0"], rows=8, cols=32)
    with pytest.raises(UnsupportedModelError, match=r"q8_0 .* need the CPU back end"):
        make_ops().linear(floats(rng, 1, 32), (weight,))


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
def test_every_plan_of_a_dense_product_is_right(rng: np.random.Generator, tokens: int) -> None:
    weight = (floats(rng, 300, 136) / 12).to(DEVICE, torch.float16)
    x = floats(rng, tokens, 136).to(DEVICE, torch.float16)
    for tma in (False, True):
        out = torch.full((tokens, 300), math.nan, dtype=torch.float16, device=DEVICE)
        linear.product(x, weight, None, out, linear.plan_product(tokens, 300, can_tma=tma))
        assert_near(out, x.double() @ weight.double().T, 2e-3)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_a_sum_in_parts_is_right(rng: np.random.Generator, splits: int) -> None:
    weight = (floats(rng, 70, 530) / 12).to(DEVICE, torch.float16)
    x, bias = floats(rng, 20, 530).to(DEVICE, torch.float16), floats(rng, 70).to(DEVICE)
    plan = replace(linear.plan_product(20, 70, can_tma=False), block_k=64, splits=splits)
    tickets = make_tickets(x.device)
    for _ in range(2):  # the tickets of the first are free again
        out = torch.full((20, 70), math.nan, dtype=torch.float16, device=DEVICE)
        linear.product(x, weight, bias, out, plan, tickets)
        assert_near(out, x.double() @ weight.double().T + bias.double(), 2e-3)
    assert not tickets.any()


def test_only_without_determinism_sums_are_in_parts(rng: np.random.Generator) -> None:
    (weight,) = make_stack(rng, 1, 60, 700, torch.bfloat16)
    x = floats(rng, 70, 700).to(DEVICE, torch.bfloat16)
    ops = make_ops(is_deterministic=True)
    assert linear.plan_product(20, 60, can_tma=False).splits > 1
    assert torch.equal(ops.linear(x[:20], (weight,)), ops.linear(x, (weight,))[:20])


@pytest.mark.parametrize("plan", [(1, 64, 1), (4, 256, 4), (16, 32, 2)])
def test_every_plan_for_one_row_is_right(
    rng: np.random.Generator, plan: tuple[int, int, int]
) -> None:
    plan_of = matvec.RowsPlan(block_n=plan[0], block_k=plan[1], num_warps=plan[2])
    experts = make_experts(rng, 4, 136, 72, torch.float16)
    x = floats(rng, 2, 136).to(DEVICE, torch.float16)
    out = torch.full((1, 72), math.nan, dtype=torch.float32, device=DEVICE)
    weight = experts.up[2].data
    matvec.matvec(x[:1], weight, None, out, plan_of)
    assert_near(out, x[:1].double() @ weight.double().T, 1e-6)
    weights, ids = routed(rng, 2, 4, 3)
    stacks = [stacked_view(w) for w in (experts.gate, experts.up, experts.down)]
    stacked = moe.StackedExperts(gate_EFM=stacks[0], up_EFM=stacks[1], down_EMF=stacks[2])
    hidden = matvec.gate_up_of_pairs(x, ids, stacked, "silu", plan_of)
    found = matvec.down_and_combine(hidden, weights, ids, stacked, plan_of)
    assert_near(found, exact_moe(x, weights, ids, experts), 2e-3)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("size", [1, 5, 64, 577, 2048])
def test_rms_norm_equals_float64(rng: np.random.Generator, size: int, dtype: torch.dtype) -> None:
    x, weight = floats(rng, 3, size).to(DEVICE, dtype), floats(rng, size).to(DEVICE, dtype)
    residual = floats(rng, 3, size).to(DEVICE, dtype)
    ops, kept = make_ops(), x.clone()
    for found, y in (
        (ops.rms_norm(x, weight, 1e-5), x.double()),
        (ops.add_rms_norm(x, residual, weight, 1e-5), residual.double()),
    ):
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        assert_near(found, y * scale * weight.double(), TOLERANCES[dtype])
        assert torch.equal(x, kept)


def test_add_rms_norm_adds_in_place(rng: np.random.Generator) -> None:
    x, residual = floats(rng, 70, 77).to(DEVICE), floats(rng, 70, 77).to(DEVICE)
    total = x + residual
    make_ops().add_rms_norm(x, residual, floats(rng, 77).to(DEVICE), 1e-6)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_gated_mlp_equals_float64(
    rng: np.random.Generator, dtype: torch.dtype, activation: str
) -> None:
    gate, up = make_stack(rng, 2, 96, 64, dtype)
    down = make_stack(rng, 1, 64, 96, dtype)[0]
    x = floats(rng, 5, 64).to(DEVICE, dtype)
    found = make_ops().gated_mlp(x, gate, up, down, activation)
    expected = exact_mlp(x, gate.data, up.data, down.data, activation)
    assert_near(found, expected, TOLERANCES[dtype])


def test_embedding_returns_the_rows_and_nan_for_unknown_ids(rng: np.random.Generator) -> None:
    table = make_stack(rng, 1, 40, 1100, torch.bfloat16)[0]
    ids = torch.tensor([39, 0, 7, 7, 40, -1], dtype=torch.int32, device=DEVICE)
    found = make_ops().embedding(ids, table)
    assert torch.equal(found[:4], table.data[ids[:4].long()].float())
    assert found[4:].isnan().all()


def test_no_tokens_give_no_rows(rng: np.random.Generator) -> None:
    experts = make_experts(rng, 2, 64, 32, torch.float32)
    x, ids = floats(rng, 0, 64).to(DEVICE), torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    ops = make_ops()
    assert ops.moe(x, torch.zeros(0, 2, device=DEVICE), ids, experts, "silu").shape == (0, 64)
    assert ops.linear(x, experts.gate[:1]).shape == (0, 32)
    assert ops.rms_norm(x, torch.ones(64, device=DEVICE), 1e-5).shape == (0, 64)


def test_the_plan_is_a_pure_function_of_the_shape() -> None:
    def kind(tokens: int, top_k: int, count: int, inner: int) -> int:
        plan = plan_moe(tokens, top_k, count, inner, can_tma=True)
        assert plan == plan_moe(tokens, top_k, count, inner, can_tma=True)
        for launch in (plan.gate_up, plan.down):
            stage = (launch.block_n * 2 + plan.block_p) * launch.block_k * 2
            assert launch is plan.down or stage * launch.num_stages <= 227 << 10
            assert not launch.tma or plan.block_p == 128
        return 1 if plan.is_direct else plan.block_p

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
