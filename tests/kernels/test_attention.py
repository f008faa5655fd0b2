"""Paged attention against whole score matrices in float64; unseen slots are NaN everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.kernels.ops import Ops
from tests.kernels.cases import assert_close, exact_attention, floats, make_paged

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
    found = ops.attention(q, paged.layer, batch, 0.25, window)
    assert_close(found, exact_attention(q, paged, batch, 0.25, window))


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
    found = ops.attention(q, paged.layer, batch, scale, None)
    assert_close(found, exact_attention(q, paged, batch, scale, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [12, 64])
def test_16_bit_cache(
    ops: Ops, rng: np.random.Generator, dtype: torch.dtype, head_size: int
) -> None:
    lengths, query_lens = [1, 100, 400], [1, 1, 123]
    paged = make_paged(rng, lengths, (3, head_size), dtype=dtype)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 9, head_size)
    found = ops.attention(q, paged.layer, batch, 0.125, None)
    assert_close(found, exact_attention(q, paged, batch, 0.125, None))


@pytest.mark.parametrize("window", [None, 500])
def test_one_long_sequence_decodes_alone(
    ops: Ops, rng: np.random.Generator, window: int | None
) -> None:
    paged = make_paged(rng, [2000], (1, 64))
    batch = paged.batch([2000], [1])
    q = floats(rng, 1, 3, 64)
    found = ops.attention(q, paged.layer, batch, 0.125, window)
    assert_close(found, exact_attention(q, paged, batch, 0.125, window))


def test_large_scores_do_not_overflow(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [150], (1, 16))
    batch = paged.batch([150], [20])
    q = floats(rng, 20, 2, 16) * 1e4
    found = ops.attention(q, paged.layer, batch, 1.0, None)
    # float32 scores of 1e5 carry an error of 1e-2, which softmax turns into a factor.
    assert_close(found, exact_attention(q, paged, batch, 1.0, None), tolerance=0.05)
    assert found.isfinite().all()


def test_blocks_wholly_behind_the_window_are_not_read(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [200], (2, 16))
    batch = paged.batch([200], [10])
    q = floats(rng, 10, 4, 16)
    expected = ops.attention(q, paged.layer, batch, 0.25, 40)
    freed = paged.table[0, : (200 - 10 + 1 - 40) // 16].long()
    paged.layer.key[freed], paged.layer.value[freed] = torch.nan, torch.nan
    paged.table[0, : len(freed)] = 0
    assert torch.equal(ops.attention(q, paged.layer, batch, 0.25, 40), expected)


def test_a_sequence_without_queries_is_skipped(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [20, 30, 40], (2, 16))
    batch = paged.batch([20, 30, 40], [3, 0, 1])
    q = floats(rng, 4, 4, 16)
    found = ops.attention(q, paged.layer, batch, 0.25, None)
    assert_close(found, exact_attention(q, paged, batch, 0.25, None))


def test_a_block_beyond_the_arena_is_an_error(native: Ops, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [40], (1, 8))
    paged.table[0, 1] = len(paged.layer.key)
    batch = paged.batch([40], [1])
    with pytest.raises(IndexError):
        native.attention(floats(rng, 1, 1, 8), paged.layer, batch, 1.0, None)
