"""Paged attention against whole score matrices in float64; unseen slots are NaN everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.kernels.ops import Ops
from octavo.visibility import Chunk, Full, Visibility, Window
from tests.kernels.cases import assert_close, attention_op, exact_attention, floats, make_paged

EDGES = [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 300, 511, 513]


@pytest.mark.parametrize("window", [None, 1, 7, 64, 300])
@pytest.mark.parametrize("decode", [True, False])
def test_lengths_around_block_and_tile_edges(
    ops: Ops, rng: np.random.Generator, window: int | None, decode: bool
) -> None:
    paged = make_paged(rng, EDGES, (2, 16))
    query_lens = [1 if decode else int(rng.integers(1, n + 1)) for n in EDGES]
    batch = paged.batch(EDGES, query_lens)
    q = floats(rng, sum(query_lens), 6, 16)
    op = attention_op(q.shape[1], paged.layer, 0.25, window)
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("head_size", [8, 12, 16, 64, 80, 96, 128, 192, 256])
def test_every_head_size_and_group(
    ops: Ops, rng: np.random.Generator, group: int, head_size: int
) -> None:
    lengths, query_lens = [70, 33, 90], [1, 33, 40]
    paged = make_paged(rng, lengths, (2, head_size))
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 2 * group, head_size)
    scale = head_size**-0.5
    op = attention_op(q.shape[1], paged.layer, scale)
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [12, 64])
def test_16_bit_cache(
    ops: Ops, rng: np.random.Generator, dtype: torch.dtype, head_size: int
) -> None:
    lengths, query_lens = [1, 100, 400], [1, 1, 123]
    paged = make_paged(rng, lengths, (3, head_size), dtype=dtype)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 9, head_size)
    op = attention_op(q.shape[1], paged.layer, 0.125)
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("window", [None, 500])
def test_one_long_sequence_decodes_alone(
    ops: Ops, rng: np.random.Generator, window: int | None
) -> None:
    paged = make_paged(rng, [2000], (1, 64))
    batch = paged.batch([2000], [1])
    q = floats(rng, 1, 3, 64)
    op = attention_op(q.shape[1], paged.layer, 0.125, window)
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


def test_large_scores_do_not_overflow(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [150], (1, 16))
    batch = paged.batch([150], [20])
    q = floats(rng, 20, 2, 16) * 1e4
    op = attention_op(q.shape[1], paged.layer, 1.0)
    found = ops.attention(q, op, paged.layer, batch)
    # float32 scores of 1e5 carry an error of 1e-2, which softmax turns into a factor.
    assert_close(found, exact_attention(q, paged, batch, op), tolerance=0.05)
    assert found.isfinite().all()


def test_blocks_wholly_behind_the_window_are_not_read(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [200], (2, 16))
    batch = paged.batch([200], [10])
    q = floats(rng, 10, 4, 16)
    op = attention_op(4, paged.layer, 0.25, 40)
    expected = ops.attention(q, op, paged.layer, batch)
    freed = paged.table[0, : (200 - 10 + 1 - 40) // 16].long()
    paged.layer.key[freed], paged.layer.value[freed] = torch.nan, torch.nan
    paged.table[0, : len(freed)] = 0
    assert torch.equal(ops.attention(q, op, paged.layer, batch), expected)


def test_a_sequence_without_queries_is_skipped(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [20, 30, 40], (2, 16))
    batch = paged.batch([20, 30, 40], [3, 0, 1])
    q = floats(rng, 4, 4, 16)
    op = attention_op(q.shape[1], paged.layer, 0.25)
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


def test_a_block_beyond_the_arena_is_an_error(native: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [40], (1, 8))
    paged.table[0, 1] = len(paged.layer.key)
    batch = paged.batch([40], [1])
    op = attention_op(1, paged.layer, 1.0)
    with pytest.raises(IndexError):
        native.attention(floats(rng, 1, 1, 8), op, paged.layer, batch)


@pytest.mark.parametrize("size", [1, 7, 16, 64, 300])
@pytest.mark.parametrize("decode", [True, False])
def test_a_query_sees_its_own_chunk_alone(
    ops: Ops, rng: np.random.Generator, size: int, decode: bool
) -> None:
    lengths = sorted({*EDGES, size - 1, size, size + 1, 2 * size} - {0})
    paged = make_paged(rng, lengths, (2, 16))
    query_lens = [1 if decode else int(rng.integers(1, n + 1)) for n in lengths]
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 6, 16)
    op = attention_op(6, paged.layer, 0.25, Chunk(size))
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


SIGHTS = [Full(), Window(20), Chunk(48)]


@pytest.mark.parametrize("visibility", SIGHTS, ids=str)
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_sinks_and_soft_caps_of_every_visibility(
    ops: Ops,
    rng: np.random.Generator,
    visibility: Visibility,
    decode: bool,
    soft_cap: float | None,
    has_sinks: bool,
) -> None:
    lengths = [1, 16, 17, 48, 49, 257, 300]
    paged = make_paged(rng, lengths, (2, 16))
    query_lens = [1 if decode else int(rng.integers(1, n + 1)) for n in lengths]
    batch = paged.batch(lengths, query_lens)
    # Some scores beyond the cap, sinks from nothing to more than all keys together.
    q, sinks_H = 3 * floats(rng, sum(query_lens), 6, 16), torch.tensor([-30.0, -2, 0, 1, 5, 40])
    op = attention_op(
        6,
        paged.layer,
        0.25,
        visibility,
        sinks_H=sinks_H if has_sinks else None,
        soft_cap=soft_cap,
    )
    found = ops.attention(q, op, paged.layer, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


def test_a_sink_of_nothing_changes_nothing(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [300], (2, 16))
    batch, q = paged.batch([300], [40]), floats(rng, 40, 6, 16)
    op = attention_op(6, paged.layer, 0.25)
    none = attention_op(6, paged.layer, 0.25, sinks_H=torch.full((6,), -torch.inf))
    expected = ops.attention(q, op, paged.layer, batch)
    found = ops.attention(q, none, paged.layer, batch)
    assert_close(found, expected.double())


def test_what_is_not_rotated_is_cached_as_it_came(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [40], (2, 16))
    batch, qkv = paged.batch([40], [9]), floats(rng, 9, (6 + 2 + 2) * 16)
    found = ops.rope_and_cache(qkv, attention_op(6, paged.layer, 1.0), paged.layer, batch)
    q, k, v = qkv.unflatten(1, (10, 16)).split([6, 2, 2], dim=1)
    block, offset = batch.slot_mapping_T // 16, batch.slot_mapping_T % 16
    assert torch.equal(found, q)
    assert torch.equal(paged.layer.key[block, offset], k)
    assert torch.equal(paged.layer.value[block, offset], v)
