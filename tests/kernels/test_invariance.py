"""The native kernels give a row the same bits whatever else is in the batch, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import KVLayer
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops
from tests.kernels.cases import (
    attention_op,
    floats,
    make_experts,
    make_paged,
    make_weight,
    plain_router,
)

CUTS = ([1] * 9, [2, 7], [3, 1, 5], [4, 5], [9])
MANY = [[131], [1, 130], [64, 67], [7, 100, 24], [4, 4, 3, 120]]


def _pieces(x: Tensor, cut: list[int]) -> tuple[Tensor, ...]:
    return x[: sum(cut)].split(cut)


@pytest.mark.parametrize("name", list(WEIGHT_FORMATS))
def test_linear_rows_do_not_depend_on_the_batch(
    native: Ops, rng: np.random.Generator, name: str
) -> None:
    weights = [make_weight(name, rows, 1024, rng) for rows in (29, 50)]
    x = floats(rng, 9, 1024)
    alone = torch.cat([native.linear(row, weights) for row in x.split(1)])
    for cut in CUTS:
        assert torch.equal(torch.cat([native.linear(p, weights) for p in _pieces(x, cut)]), alone)


@pytest.mark.parametrize("cols", [5, 200, 769, 2310])
def test_long_prompts_and_odd_columns_do_not_change_the_bits(
    native: Ops, rng: np.random.Generator, cols: int
) -> None:
    weights = [make_weight(name, 50, cols, rng) for name in ("f32", "f16", "bf16")]
    x = floats(rng, 131, cols)
    alone = torch.cat([native.linear(row, weights) for row in x.split(1)])
    for cut in MANY:
        assert torch.equal(torch.cat([native.linear(p, weights) for p in x.split(cut)]), alone)


def test_the_number_of_threads_does_not_change_the_bits(
    native: Ops, rng: np.random.Generator
) -> None:
    other = select_ops("native", Needs())
    weight, experts = make_weight("q4_1", 100, 512, rng), make_experts(rng, "bf16", 4, 96)
    x, y = floats(rng, 30, 512), floats(rng, 30, 64)
    ids = torch.from_numpy(rng.integers(0, 4, (30, 1))).to(torch.int32)
    assert torch.equal(native.linear(x, (weight,)), other.linear(x, (weight,)))
    found = [ops.moe(y, torch.ones(30, 1), ids, experts, "silu") for ops in (native, other)]
    assert torch.equal(*found)
    paged = make_paged(rng, [900], (1, 16))
    batch, q = paged.batch([900], [1]), floats(rng, 1, 4, 16)
    op = attention_op(4, paged.layer, 0.25)
    found = [ops.attention(q, op, paged.layer, batch) for ops in (native, other)]
    assert torch.equal(*found)


def test_mlp_and_moe_rows_do_not_depend_on_the_batch(native: Ops, rng: np.random.Generator) -> None:
    experts = make_experts(rng, "bf16", 5, 96)
    gate, up, down = experts.gate[0], experts.up[0], experts.down[0]
    x, weights = floats(rng, 9, 64), floats(rng, 9, 2)
    ids = torch.stack([torch.from_numpy(rng.permutation(5)[:2]) for _ in range(9)]).to(torch.int32)
    alone = torch.cat([native.gated_mlp(row, (gate, up), down, "silu") for row in x.split(1)])
    mixed = [
        native.moe(x[i : i + 1], weights[i : i + 1], ids[i : i + 1], experts, "silu")
        for i in range(9)
    ]
    for cut in CUTS:
        parts = [native.gated_mlp(p, (gate, up), down, "silu") for p in _pieces(x, cut)]
        assert torch.equal(torch.cat(parts), alone)
        triples = zip(x.split(cut), weights.split(cut), ids.split(cut), strict=True)
        parts = [native.moe(*triple, experts, "silu") for triple in triples]
        assert torch.equal(torch.cat(parts), torch.cat(mixed))


@pytest.mark.parametrize("window", [None, 30, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_chunks_or_neighbours(
    native: Ops, rng: np.random.Generator, window: int | None, dtype: torch.dtype
) -> None:
    lengths = [700, 90, 300]
    paged = make_paged(rng, lengths, (2, 16), dtype=dtype)
    q = floats(rng, sum(lengths), 6, 16)
    op = attention_op(6, paged.layer, 0.25, window)
    whole = native.attention(q, op, paged.layer, paged.batch(lengths, lengths))
    starts = [0, 700, 790]
    for _ in range(12):
        seq_lens = [int(rng.integers(1, n + 1)) for n in lengths]
        query_lens = [int(rng.integers(0, n + 1)) for n in seq_lens]
        if rng.integers(2):
            query_lens = [min(n, 1) for n in query_lens]
        rows = torch.cat(
            [
                torch.arange(start + n - some, start + n)
                for start, n, some in zip(starts, seq_lens, query_lens, strict=True)
            ]
        )
        batch = paged.batch(seq_lens, query_lens)
        found = native.attention(q[rows], op, paged.layer, batch)
        assert torch.equal(found, whole[rows])


def test_where_blocks_lie_does_not_change_the_bits(native: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [333], (2, 16))
    q, batch = floats(rng, 40, 4, 16), paged.batch([333], [40])
    op = attention_op(4, paged.layer, 0.25)
    before = native.attention(q, op, paged.layer, batch)
    order = torch.from_numpy(rng.permutation(len(paged.layer.key)))
    moved = KVLayer(key=paged.layer.key[order], value=paged.layer.value[order])
    used = -(-333 // 16)
    paged.table[0, :used] = order.argsort()[paged.table[0, :used].long()].to(torch.int32)
    assert torch.equal(native.attention(q, op, moved, batch), before)


def test_norms_and_routes_do_not_depend_on_the_batch(native: Ops, rng: np.random.Generator) -> None:
    x, weight = floats(rng, 40, 100), floats(rng, 100)
    whole = native.rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.cat([native.rms_norm(r, weight, 1e-5) for r in x.split(1)]), whole)
    counts = torch.zeros(x.shape[1], dtype=torch.int64)
    routed, ids = native.route(x, plain_router(6), counts)
    for t in range(40):
        one, one_ids = native.route(x[t : t + 1], plain_router(6), counts)
        assert torch.equal(one[0], routed[t])
        assert torch.equal(one_ids[0], ids[t])
