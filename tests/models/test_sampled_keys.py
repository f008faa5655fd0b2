"""What keys learn from a sample changes no score, and makes those of other texts small and even."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionOp, KeyChange, QKNorm, RopeTable
from octavo.kernels.reference import ReferenceOps
from octavo.layers.rope import build_rope_table, rotated
from octavo.layers.rope_spec import RopeSpec
from octavo.models.sampled_keys import common_key, learn, op_with_room
from tests.kernels.cases import floats
from tests.kernels.kv_cases import kv_op, make_stored

SIZE = 64


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def table() -> RopeTable:
    spec = RopeSpec(
        type="default", theta=10000.0, rotary_dim=SIZE, original_max_position_embeddings=4096
    )
    return build_rope_table(spec, 4096, torch.device("cpu"))


def learning(**changes: Any) -> AttentionOp:
    op = replace(kv_op(4, (2, SIZE)), rope=table(), **changes)
    return op_with_room(op, torch.device("cpu"))


def change_of(op: AttentionOp) -> KeyChange:
    assert op.key_change is not None
    return op.key_change


def factors_of(op: AttentionOp) -> Tensor:
    factors = change_of(op).factor_KD
    assert factors is not None
    return factors


def uneven(rng: np.random.Generator, num_tokens: int) -> Tensor:
    """Keys with numbers that all share, and some that are far larger than a query's there."""
    qkv = floats(rng, num_tokens, 8 * SIZE)
    keys = qkv[:, 4 * SIZE : 6 * SIZE].view(num_tokens, 2, SIZE)
    keys[:, :, 3] *= 60.0
    keys[:, :, SIZE - 1] += 40.0
    queries = qkv[:, : 4 * SIZE].view(num_tokens, 4, SIZE)
    queries[:, :, [3, 3 + SIZE // 2]] /= 20.0
    return qkv


@pytest.mark.parametrize("formats", ["fp8", "int8", "int4"])
def test_keys_of_another_text_lose_less(rng: np.random.Generator, formats: str) -> None:
    op, plain = learning(scale=0.1), replace(learning(scale=0.1), key_change=None)
    learn(op, uneven(rng, 300))
    qkv, ops, found = uneven(rng, 200), ReferenceOps(1), {}
    for name, one, kept in (("exact", plain, "float32"), ("plain", plain, formats)):
        paged = make_stored(rng, [200], (2, SIZE), kept, is_written=False)
        found[name] = ops.rope_attention(qkv, one, paged.layer, paged.batch([200], [200]))
    paged = make_stored(rng, [200], (2, SIZE), formats, is_written=False)
    learned = ops.rope_attention(qkv, op, paged.layer, paged.batch([200], [200]))
    before, after = (
        (one - found["exact"]).square().mean().sqrt() for one in (found["plain"], learned)
    )
    assert after < 0.75 * before


def test_keys_that_are_not_compressed_stay_as_they_are(rng: np.random.Generator) -> None:
    op = learning()
    learn(op, uneven(rng, 300))
    qkv, results = uneven(rng, 20), []
    for one in (op, replace(op, key_change=None)):
        paged = make_stored(rng, [20], (2, SIZE), "bfloat16", is_written=False)
        results.append(
            ReferenceOps(1).rope_attention(qkv, one, paged.layer, paged.batch([20], [20]))
        )
    assert torch.equal(*results)


def test_the_two_numbers_that_turn_together_have_one_factor(rng: np.random.Generator) -> None:
    op = learning()
    learn(op, uneven(rng, 300))
    factors = factors_of(op)
    assert torch.equal(factors[:, : SIZE // 2], factors[:, SIZE // 2 :])
    assert (factors[:, 3] > 4).all()
    assert (factors > 0).all()


def test_what_is_taken_off_is_the_mean_of_rotated_keys(rng: np.random.Generator) -> None:
    op = learning()
    constant = floats(rng, 1, 2, SIZE).expand(4096, 2, SIZE)
    mean, first = rotated(constant, table()).mean(0), constant[0]
    expected = 0.75 * mean + 0.25 * first
    torch.testing.assert_close(common_key(op, constant[:200]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noticing", [{"sinks_H": torch.zeros(4)}, {"soft_cap": 20.0}])
def test_nothing_is_taken_off_where_the_softmax_would_notice(
    rng: np.random.Generator, noticing: dict[str, Any]
) -> None:
    op = learning(**noticing)
    learn(op, uneven(rng, 300))
    assert not change_of(op).shift_KD.any()
    assert (factors_of(op) != 1).any()


@pytest.mark.parametrize("per_head", [True, False])
def test_norms_come_first(rng: np.random.Generator, per_head: bool) -> None:
    query, key = (floats(rng, (1 if per_head else n) * SIZE).exp() for n in (4, 2))
    norm = QKNorm(query=query, key=key, eps=1e-6, per_head=per_head)
    op, plain, qkv = learning(qk_norm=norm), learning(), uneven(rng, 300)
    learn(op, qkv)
    ops = ReferenceOps(1)
    q, k, v = qkv.split([4 * SIZE, 2 * SIZE, 2 * SIZE], dim=1)
    normed = (
        ops.rms_norm(part.reshape(-1, len(weight)), weight, 1e-6).view(part.shape)
        for part, weight in ((q, query), (k, key))
    )
    learn(plain, torch.cat((*normed, v), dim=1))
    torch.testing.assert_close(change_of(op).shift_KD, change_of(plain).shift_KD)
    torch.testing.assert_close(factors_of(op), factors_of(plain))


def test_numbers_that_are_always_zero_are_left_alone(rng: np.random.Generator) -> None:
    op, qkv = learning(), uneven(rng, 300)
    qkv[:, 4 * SIZE : 6 * SIZE] = 0.0
    learn(op, qkv)
    assert torch.equal(factors_of(op), torch.ones(2, SIZE))
    assert not change_of(op).shift_KD.any()
