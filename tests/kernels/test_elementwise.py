"""Norms, routing, rotary embedding with the cache write, and block copies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import AttentionBatch, KVLayer, QKNorm, RopeTable
from octavo.kernels.ops import Ops
from tests.kernels.cases import assert_close, attention_op, floats, plain_router


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("size", [1, 5, 8, 9, 64, 577, 2048])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_rms_norm_equals_float64(
    ops: Ops, rng: np.random.Generator, size: int, tokens: int
) -> None:
    x, weight = floats(rng, tokens, size) * 3, floats(rng, size)
    kept = x.clone()
    assert_close(ops.rms_norm(x, weight, 1e-5), _norm(x, weight, 1e-5))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("tokens", [1, 70])
def test_add_rms_norm_adds_in_place(ops: Ops, rng: np.random.Generator, tokens: int) -> None:
    x, residual, weight = floats(rng, tokens, 77), floats(rng, tokens, 77), floats(rng, 77)
    total = x + residual
    found = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert_close(found, _norm(total, weight, 1e-6))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (8, 2), (60, 4), (128, 8)])
def test_route_takes_the_best_experts(
    ops: Ops, rng: np.random.Generator, experts: int, top_k: int, renormalize: bool
) -> None:
    logits = floats(rng, 33, experts) * 2
    counts = torch.ones(experts + 1, dtype=torch.int64)
    weights, ids = ops.route(logits, plain_router(top_k, renormalize), counts)
    assert torch.equal(counts - 1, torch.bincount(ids.flatten(), minlength=experts + 1))
    expected, chosen = logits.double().softmax(-1).topk(top_k, -1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.dtype is torch.int32
    assert torch.equal(ids.long(), chosen)
    assert_close(weights, expected)


def test_route_takes_the_lower_of_equal_experts(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    weights, ids = ops.route(logits, plain_router(4), torch.zeros(5, dtype=torch.int64))
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert weights[0, 0] == weights[0, 1]


def test_route_of_nan_still_names_experts_that_exist(native: Ops) -> None:
    counts = torch.zeros(5, dtype=torch.int64)
    _, ids = native.route(torch.full((2, 5), math.nan), plain_router(3), counts)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def _rotated(x_THD: torch.Tensor, rope: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    half = rope.rotary_dim // 2
    cos = rope.cos[positions.long()].double().unsqueeze(1)
    sin = rope.sin[positions.long()].double().unsqueeze(1)
    out = x_THD.double().clone()
    low, high = out[..., :half].clone(), out[..., half : 2 * half].clone()
    out[..., :half], out[..., half : 2 * half] = low * cos - high * sin, high * cos + low * sin
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(8, 8), (16, 4), (64, 64), (12, 6)])
@pytest.mark.parametrize("norm", [None, "per head", "whole"])
def test_rope_and_cache_writes_its_slots_and_no_others(
    ops: Ops,
    rng: np.random.Generator,
    dtype: torch.dtype,
    head_size: int,
    rotary_dim: int,
    norm: str | None,
) -> None:
    tokens, heads, kv_heads = 21, 6, 2
    angles = floats(rng, 100, rotary_dim // 2)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rotary_dim)
    arena = torch.full((9, 2, 16, kv_heads, head_size), math.nan, dtype=dtype)
    layer = KVLayer(key=arena[:, 0], value=arena[:, 1])
    slots = torch.from_numpy(rng.permutation(9 * 16)[:tokens])
    positions = torch.from_numpy(rng.integers(0, 100, tokens)).to(torch.int32)
    batch = AttentionBatch(
        positions_T=positions,
        slot_mapping_T=slots,
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens_S=torch.tensor([100], dtype=torch.int32),
        block_table=torch.zeros(1, 9, dtype=torch.int32),
    )
    qkv = floats(rng, tokens, (heads + 2 * kv_heads) * head_size)
    q, k, v = qkv.split([heads * head_size, kv_heads * head_size, kv_heads * head_size], 1)
    q, k = q.unflatten(1, (heads, -1)), k.unflatten(1, (kv_heads, -1))
    qk_norm = None
    if norm is not None:
        sizes = (1, 1) if norm == "per head" else (heads, kv_heads)
        weights = [floats(rng, n * head_size) for n in sizes]
        qk_norm = QKNorm(query=weights[0], key=weights[1], eps=1e-5, per_head=norm == "per head")
        q = _norm(q.reshape(-1, len(weights[0])), weights[0], 1e-5).view(tokens, heads, -1)
        k = _norm(k.reshape(-1, len(weights[1])), weights[1], 1e-5).view(tokens, kv_heads, -1)
    op = attention_op(heads, layer, 1.0, rope=rope, qk_norm=qk_norm)
    found = ops.rope_and_cache(qkv, op, layer, batch)
    assert_close(found, _rotated(q, rope, positions))
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    block, offset = slots // 16, slots % 16
    assert_close(layer.key[block, offset].float(), _rotated(k, rope, positions), rounding)
    assert torch.equal(layer.value[block, offset], v.unflatten(1, (kv_heads, -1)).to(dtype))
    written = arena.isfinite().view(9, 2, 16, -1).any(-1).sum()
    assert written == 2 * tokens


def test_copies_happen_in_order(ops: Ops, rng: np.random.Generator) -> None:
    arena = floats(rng, 4, 3, 5)
    kept = arena.clone()
    ops.copy_blocks(arena, [(0, 1), (1, 2)])
    assert torch.equal(arena, kept[[0, 0, 0, 3]])


@pytest.mark.parametrize("has_gate", [True, False])
def test_add_gated_adds_in_place(ops: Ops, rng: np.random.Generator, has_gate: bool) -> None:
    out, x, gate = floats(rng, 5, 40), floats(rng, 5, 40), floats(rng, 5, 1)
    expected = out.double() + x.double() * (torch.sigmoid(gate.double()) if has_gate else 1)
    ops.add_gated(out, x, gate if has_gate else None)
    assert_close(out, expected)
