"""Windows, chunks, sinks and soft caps in Triton's attention against float64: every path of a step.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, RopeTable
from octavo.kernels.reference import ReferenceOps
from octavo.visibility import Chunk, Full, Visibility, Window
from tests.kernels.cases import (
    PagedKV,
    assert_close,
    attention_op,
    exact_attention,
    floats,
    make_paged,
)
from tests.kernels.triton.cases import there
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention import choose  # isort: skip
from octavo.kernels.triton.attention.decode import decode_attention  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention  # isort: skip
from octavo.kernels.triton.attention.splits import tiling  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEEN = [Full(), Window(70), Chunk(16), Chunk(100)]
EXTRAS = [(False, None), (True, 3.0)]
"""Whether there are sinks, and the soft cap."""
LENGTHS = [1, 16, 49, 100, 101, 200, 330]


def _op(
    rng: np.random.Generator,
    paged: PagedKV,
    visibility: Visibility,
    extras: tuple[bool, float | None],
    heads: int = 6,
) -> AttentionOp:
    has_sinks, cap = extras
    sinks = floats(rng, heads) * 2 if has_sinks else None
    return attention_op(heads, paged.layer, 0.5, visibility, sinks_H=sinks, soft_cap=cap)


def _there(op: AttentionOp) -> AttentionOp:
    return op if op.sinks_H is None else replace(op, sinks_H=op.sinks_H.to(DEVICE))


def _attend(
    q: Tensor, paged: PagedKV, batch: AttentionBatch, op: AttentionOp, *, is_deterministic: bool
) -> Tensor:
    layer, moved = there(paged, batch)
    return choose.attention(
        q.to(DEVICE), _there(op), layer, moved, is_deterministic=is_deterministic
    ).cpu()


@pytest.fixture
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "SHORT_QUERIES", 16)
    monkeypatch.setattr(choose, "SHORT_SPLITS", 4)
    monkeypatch.setattr(choose, "SHORTEST_SPLIT", 128)
    monkeypatch.setattr(choose, "SHORT_TOKENS", 32)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("visibility", SEEN, ids=str)
def test_decodes(
    rng: np.random.Generator, visibility: Visibility, extras: tuple[bool, float | None]
) -> None:
    paged = make_paged(rng, LENGTHS, (2, 16))
    batch = paged.batch(LENGTHS, [1] * len(LENGTHS))
    op, q = _op(rng, paged, visibility, extras), floats(rng, len(LENGTHS), 6, 16)
    expected = exact_attention(q, paged, batch, op)
    for is_deterministic in (False, True):
        assert_close(_attend(q, paged, batch, op, is_deterministic=is_deterministic), expected)


@pytest.mark.usefixtures("_small_splits")
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("visibility", SEEN, ids=str)
def test_short_and_long_chunks_across_edges(
    rng: np.random.Generator, visibility: Visibility, extras: tuple[bool, float | None]
) -> None:
    lengths, query_lens = [60, 101, 330, 120], [9, 2, 5, 30]
    paged = make_paged(rng, lengths, (2, 16))
    batch = paged.batch(lengths, query_lens)
    op, q = _op(rng, paged, visibility, extras), floats(rng, sum(query_lens), 6, 16)
    expected = exact_attention(q, paged, batch, op)
    assert_close(_attend(q, paged, batch, op, is_deterministic=False), expected)


@pytest.mark.parametrize("extras", EXTRAS[1:], ids=str)
def test_shared_prefixes(rng: np.random.Generator, extras: tuple[bool, float | None]) -> None:
    lengths = [150, 130, 129, 140]
    paged = make_paged(rng, lengths, (2, 16))
    for s in range(1, len(lengths)):  # the first 128 tokens are those of the first sequence
        paged.table[s, :8] = paged.table[0, :8]
        paged.keys[s][:128], paged.values[s][:128] = paged.keys[0][:128], paged.values[0][:128]
    batch = paged.batch(lengths, [1] * len(lengths))
    op, q = _op(rng, paged, Full(), extras), floats(rng, len(lengths), 6, 16)
    plan = plan_shared_prefix(
        paged.table.numpy(),
        np.array(lengths, np.int32),
        np.ones(len(lengths), np.int32),
        tiling(6, 2, 132),
        min_blocks=4,
    )
    assert plan is not None
    layer, moved = there(paged, batch)
    prefix = plan.to_device(torch.device(DEVICE))
    found = shared_prefix_attention(q.to(DEVICE), _there(op), layer, moved, prefix)
    assert_close(found.cpu(), exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("rotary_dim", [0, 6, 16])
def test_decodes_that_write_their_keys_with_and_without_rotation(
    rng: np.random.Generator, rotary_dim: int
) -> None:
    lengths = [5, 40, 64]
    paged, other = (make_paged(np.random.default_rng(3), lengths, (2, 16)) for _ in range(2))
    batch = paged.batch(lengths, [1] * len(lengths))
    angles = floats(rng, 64, rotary_dim // 2)
    whole = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rotary_dim)
    table = whole if rotary_dim else None
    sinks = floats(rng, 4)
    op = attention_op(4, paged.layer, 0.5, Window(30), rope=table, sinks_H=sinks)
    qkv = floats(rng, len(lengths), 8 * 16)
    expected = ReferenceOps(1).rope_attention(qkv, op, other.layer, batch)
    layer, moved = there(paged, batch)
    there_table = table and RopeTable(
        cos=table.cos.to(DEVICE), sin=table.sin.to(DEVICE), rotary_dim=rotary_dim
    )
    out = torch.empty(len(lengths), 4, 16, device=DEVICE)
    decode_attention(
        *(qkv.view(-1, 8, 16).to(DEVICE), replace(_there(op), rope=there_table)),
        *(layer, moved, out),
        max_seq_len=64,
        is_qkv=True,
    )
    assert_close(out.flatten(1).cpu(), expected.double())
    assert torch.equal(layer.key.isnan().cpu(), other.layer.key.isnan())
