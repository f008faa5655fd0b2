"""What the Triton ops fuse for decodes, against the same ops one by one and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import AttentionBatch, KVLayer, NormInput, QKNorm, RopeTable
from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import Router, SharedExpert, Weight
from tests.kernels.cases import attention_op, floats, make_paged
from tests.kernels.triton.cases import (
    NAMES,
    TOLERANCES,
    assert_near,
    exact_mlp,
    exact_moe,
    make_experts,
    make_ops,
    routed,
    there,
)
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention.device_plan import DevicePlan  # isort: skip
from octavo.kernels.triton.product import norm_matvec  # isort: skip
from octavo.kernels.triton.product.shapes import RowsShape  # isort: skip


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns within is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_matrices(
    rng: np.random.Generator, counts: list[int], cols: int, dtype: torch.dtype
) -> tuple[Weight, ...]:
    """Returns matrices of `counts` rows that follow each other, as a loader puts them."""
    whole = (floats(rng, sum(counts), cols) / math.sqrt(cols)).to(DEVICE, dtype)
    form = WEIGHT_FORMATS[NAMES[dtype]]
    return Weight(data=whole, format=form, rows=len(whole), cols=cols).parts(counts)


def make_rows(
    rng: np.random.Generator, size: int, dtype: torch.dtype, *, has_x: bool = True
) -> NormInput:
    x, residual, weight = (floats(rng, 1, size).to(DEVICE, dtype) for _ in range(3))
    return NormInput(
        x_TM=x if has_x else None, residual_TM=residual, weight_M=1 + weight[0] / 4, eps=1e-5
    )


def copied(rows: NormInput) -> NormInput:
    return NormInput(
        x_TM=rows.x_TM, residual_TM=rows.residual_TM.clone(), weight_M=rows.weight_M, eps=rows.eps
    )


@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("size", [8, 72, 577, 2048])
def test_a_norm_within_a_product_is_the_norm_before_it(
    rng: np.random.Generator, size: int, dtype: torch.dtype, has_x: bool
) -> None:
    rows, weights = (
        make_rows(rng, size, dtype, has_x=has_x),
        make_matrices(rng, [13, 20], size, dtype),
    )
    bias = floats(rng, 33).to(DEVICE)
    for bias_N in (None, bias):
        expected, residual = make_ops().norm_linear(copied(rows), weights, bias_N)
        before = rows.residual_TM.clone()
        with poisoned_memory():
            found, added = make_ops(is_deterministic=False).norm_linear(rows, weights, bias_N)
        assert found.dtype is dtype
        assert_near(found, expected, TOLERANCES[dtype])
        assert torch.equal(added, residual)
        assert torch.equal(rows.residual_TM, before), "others may still read it"


@pytest.mark.parametrize("numbers", [(1, 1), (2, 4), (8, 8), (16, 8)])
def test_every_shape_of_a_normed_product_is_right(
    rng: np.random.Generator, numbers: tuple[int, int]
) -> None:
    rows, (weight,) = (
        make_rows(rng, 136, torch.float16),
        make_matrices(rng, [40], 136, torch.float16),
    )
    expected, _ = make_ops().norm_linear(copied(rows), (weight,))
    shape = RowsShape(block_n=numbers[0], block_k=256, num_warps=numbers[1])
    found, _ = norm_matvec.norm_matvec(rows, weight.data, None, shape)
    assert_near(found, expected, 2e-3)


OF_CHOSEN = RoutingRule(top_k=4, score="logit", weighting="softmax", renormalize=False)


def test_a_lone_row_is_routed_by_the_softmax_of_the_chosen(rng: np.random.Generator) -> None:
    rows, weights = make_rows(rng, 72, torch.float32), make_matrices(rng, [32], 72, torch.float32)
    bias, counts = floats(rng, 32).to(DEVICE), torch.zeros(2, 32, dtype=torch.int32, device=DEVICE)
    router = Router(weights=weights, rule=OF_CHOSEN, bias_E=bias)
    assert router.is_softmax
    assert not router.is_plain
    assert not replace(router, scale_E=bias).is_softmax
    expected = make_ops().norm_route(copied(rows), router, counts[0])
    found = make_ops(is_deterministic=False).norm_route(rows, router, counts[1])
    assert torch.equal(*counts)
    assert torch.equal(found.topk_ids, expected.topk_ids)
    assert_near(found.topk_weights, expected.topk_weights, 1e-5)
    assert_near(found.x_TM, expected.x_TM, 2e-6)


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8)])
def test_routes_within_the_routers_product_are_those_after_it(
    rng: np.random.Generator, count: int, top_k: int, has_gate: bool
) -> None:
    dtype, ops = torch.float32, make_ops(is_deterministic=False)
    for step in range(3):
        rows = make_rows(rng, 72, dtype, has_x=step > 0)
        weights = make_matrices(rng, [count, 1] if has_gate else [count], 72, dtype)
        router = Router(weights=weights, rule=RoutingRule(top_k=top_k, renormalize=step > 1))
        live = torch.tensor([step], dtype=torch.int32, device=DEVICE)
        counts = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
        expected = make_ops().norm_route(copied(rows), router, counts[0], live)
        with poisoned_memory():
            found = ops.norm_route(rows, router, counts[1], live)
        assert torch.equal(*counts)
        assert torch.equal(found.topk_ids, expected.topk_ids)
        assert_near(found.topk_weights, expected.topk_weights, 1e-5)
        assert_near(found.x_TM, expected.x_TM, 2e-6)
        assert torch.equal(found.residual_TM, expected.residual_TM)
        assert (found.gate_T1 is not None) == has_gate
        if found.gate_T1 is not None and expected.gate_T1 is not None:
            assert_near(found.gate_T1, expected.gate_T1, 1e-5)
    assert ops._tickets is not None
    assert not ops._tickets.any(), "tickets are for the next launch"


@pytest.mark.parametrize(  # Every pair of two values.
    ("shared_size", "has_gate", "is_deterministic"),
    [
        *((40, True, True), (40, False, False), (160, True, False)),
        *((160, False, True), (56, True, True), (56, False, False)),
    ],
)
def test_a_shared_expert_is_added(
    rng: np.random.Generator, shared_size: int, has_gate: bool, is_deterministic: bool
) -> None:
    dtype = torch.float32
    experts = make_experts(rng, 8, 72, 40, dtype)
    gate, up = make_matrices(rng, [shared_size, shared_size], 72, dtype)
    (down,) = make_matrices(rng, [72], shared_size, dtype)
    ops = make_ops(is_deterministic=is_deterministic)
    for tokens in (1, 2, 20, 33, 70):
        x = floats(rng, tokens, 72).to(DEVICE)
        weights, ids = routed(rng, tokens, 8, 3)
        ids[0, 1] = -1
        ids[1:, 0] = 5  # of more than one tile
        logits = floats(rng, tokens, 9).to(DEVICE)[:, 8:] if has_gate else None
        with poisoned_memory():
            shared = SharedExpert(gate_up=(gate, up), down=down)
            found = ops.moe(x, weights, ids, experts, "silu", shared, logits)
        part = exact_mlp(x, gate.data, up.data, down.data, "silu")
        part *= sigmoid(logits)
        assert_near(found, exact_moe(x, weights, ids, experts) + part, 2e-6)


def sigmoid(logits: Tensor | None) -> Tensor | float:
    return 1.0 if logits is None else torch.sigmoid(logits.double())


def stacked(layer: KVLayer) -> Tensor:
    """Returns a copy of keys and values."""
    return torch.stack((layer.key, layer.value))


def padded_rows(batch: AttentionBatch, lengths: list[int]) -> AttentionBatch:
    """Returns a batch of single queries; sequences without tokens become a graph's padding."""
    live = torch.tensor([n > 0 for n in lengths], device=DEVICE)
    positions = torch.zeros(len(lengths), dtype=torch.int32, device=DEVICE)
    slots = torch.full((len(lengths),), -1, dtype=batch.slot_mapping_T.dtype, device=DEVICE)
    positions[live], slots[live] = batch.positions_T, batch.slot_mapping_T
    return replace(
        batch,
        positions_T=positions,
        slot_mapping_T=slots,
        query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE),
        plan=DevicePlan(max_query_len=1),
    )


@pytest.mark.parametrize(  # Every pair of two values.
    ("sizes", "norm", "window"),
    [
        *(((6, 2, 20, 8), "none", None), ((6, 2, 20, 8), "head", 70)),
        *(((6, 2, 20, 8), "whole", None), ((4, 4, 16, 16), "none", 70)),
        *(((4, 4, 16, 16), "head", None), ((4, 4, 16, 16), "whole", 70)),
    ],
)
def test_rope_within_attention_is_rope_before_it(
    rng: np.random.Generator,
    sizes: tuple[int, int, int, int],
    norm: str,
    window: int | None,
) -> None:
    heads, kv_heads, size, rotary_dim = sizes
    ops, apart = make_ops(is_deterministic=False), make_ops()
    angles = floats(rng, 2000, rotary_dim // 2).to(DEVICE)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rotary_dim)
    wide = (heads, kv_heads) if norm == "whole" else (1, 1)
    query, key = (floats(rng, n * size).to(DEVICE) for n in wide)
    qk_norm = QKNorm(query=query, key=key, eps=1e-6, per_head=norm == "head")
    for lengths in ([1], [16], [64], [65], [200], [1030], [130, 0, 1, 700, 65, 64]):
        paged = make_paged(rng, lengths, (kv_heads, size))
        layer, batch = there(paged, paged.batch(lengths, [int(n > 0) for n in lengths]))
        batch = padded_rows(batch, lengths)
        one, other = (
            KVLayer(key=arena[0], value=arena[1]) for arena in (stacked(layer), stacked(layer))
        )
        chosen = None if norm == "none" else qk_norm
        op = attention_op(heads, one, size**-0.5, window, rope=rope, qk_norm=chosen)
        slots = batch.slot_mapping_T[batch.slot_mapping_T >= 0]
        at = slots // 16, slots % 16
        for layer in (one, other):
            layer.key[at] = layer.value[at] = math.nan
        qkv = floats(rng, len(lengths), (heads + 2 * kv_heads) * size).to(DEVICE)
        with poisoned_memory():
            found, expected = (
                each.rope_attention(qkv, op, layer, batch)
                for each, layer in ((ops, one), (apart, other))
            )
        assert_near(found, expected, 1e-6)
        assert_near(one.key[at], other.key[at], 1e-6)
        assert torch.equal(one.value[at], other.value[at])
    assert ops._tickets is None or not ops._tickets.any()


def test_pages_that_lie_beyond_two_billion_numbers_are_found(rng: np.random.Generator) -> None:
    heads, kv_heads, size, stride = 4, 2, 16, 2**30
    page = 16 * kv_heads * size
    # Nearly all of it is never touched, so that the host has no memory behind it.
    arena = torch.empty(2 * stride + 2 * page, dtype=torch.float16, device=DEVICE)
    shape, strides = (3, 16, kv_heads, size), (stride, kv_heads * size, size, 1)
    angles = floats(rng, 20, size // 2).to(DEVICE)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=size)
    layer = KVLayer(
        key=arena.as_strided(shape, strides), value=arena.as_strided(shape, strides, page)
    )
    ops, apart = make_ops(is_deterministic=False), make_ops()
    qkv = floats(rng, 5, (heads + 2 * kv_heads) * size).to(DEVICE, torch.float16)
    found = []
    for each in (ops, apart):
        arena[2 * stride :] = math.nan
        for position in range(5):
            batch = AttentionBatch(
                positions_T=torch.tensor([position], dtype=torch.int32, device=DEVICE),
                slot_mapping_T=torch.tensor([32 + position], dtype=torch.int32, device=DEVICE),
                query_starts=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
                seq_lens_S=torch.tensor([position + 1], dtype=torch.int32, device=DEVICE),
                block_table=torch.tensor([[2]], dtype=torch.int32, device=DEVICE),
            )
            row = qkv[position : position + 1]
            op = attention_op(heads, layer, 0.25, rope=rope)
            out = each.rope_attention(row, op, layer, batch)
        found.append(out.float())
    assert_near(found[0], found[1], 2e-3)
