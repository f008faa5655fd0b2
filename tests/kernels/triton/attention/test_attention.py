"""Triton's paged attention and RoPE against float64 and the reference; unseen slots are NaN.

Runs on a GPU, else through Triton's interpreter at small shapes (CI installs triton for that).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, KVLayer, QKNorm, RopeTable
from octavo.kernels.reference import ReferenceOps
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

from octavo.kernels.triton.attention import choose as tiles  # isort: skip
from octavo.kernels.triton.attention import decode  # isort: skip
from octavo.kernels.facts import split_partials  # isort: skip
from octavo.kernels.triton.attention.partials import max_total_partials, partial_counts  # isort: skip

from octavo.kernels.triton.attention.device_plan import DevicePlan  # isort: skip
from octavo.kernels.triton.attention.write import rope_and_cache  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention  # isort: skip
from octavo.kernels.triton.attention.splits import tiling  # isort: skip

TILES = tiling(6, 2, 132)
EDGES = [1, 15, 16, 17, 63, 64, 65, 200, 1030]


def _attend(
    q: Tensor,
    paged: PagedKV,
    batch: AttentionBatch,
    window: int | None,
    *,
    is_deterministic: bool = False,
) -> Tensor:
    layer, moved = there(paged, batch)
    op = attention_op(q.shape[1], paged.layer, 0.25, window)
    found = tiles.attention(q.to(DEVICE), op, layer, moved, is_deterministic=is_deterministic)
    return found.cpu()


@pytest.fixture
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets short sequences split, and buffers fill, at the interpreter's sizes."""
    monkeypatch.setattr(tiles, "SHORT_QUERIES", 16)
    monkeypatch.setattr(tiles, "SHORT_SPLITS", 4)
    monkeypatch.setattr(tiles, "SHORTEST_SPLIT", 128)
    monkeypatch.setattr(tiles, "SHORT_TOKENS", 32)


@pytest.mark.parametrize("window", [None, 1, 64, 300])
def test_decode_around_block_and_split_edges(rng: np.random.Generator, window: int | None) -> None:
    paged = make_paged(rng, EDGES, (2, 16))
    batch = paged.batch(EDGES, [1] * len(EDGES))
    q = floats(rng, len(EDGES), 6, 16)
    expected = exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25, window))
    assert_close(_attend(q, paged, batch, window), expected)


@pytest.mark.parametrize("window", [None, 64, 300])
@pytest.mark.parametrize("programs", [1, 3])
def test_decode_by_fewer_programs_than_splits(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, programs: int, window: int | None
) -> None:
    lengths = [64, 0, 65, 257, 1030, 3, 700]
    monkeypatch.setattr(decode, "TARGET_PROGRAMS", programs * len(lengths) * 2)
    paged = make_paged(rng, lengths, (2, 16))
    batch = paged.batch(lengths, [int(n > 0) for n in lengths])
    q = floats(rng, 6, 6, 16)
    expected = exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25, window))
    for is_deterministic in (False, True):
        found = _attend(q, paged, batch, window, is_deterministic=is_deterministic)
        assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 64, 300])
def test_packed_partial_results_give_the_same_bits(
    rng: np.random.Generator, window: int | None
) -> None:
    lengths, query_lens = [200, 0, 1030, 65, 3, 130], [1, 1, 1, 0, 1, 1]
    paged = make_paged(rng, lengths, (2, 16))
    batch = paged.batch(lengths, query_lens)
    counts = partial_counts(np.array(lengths), None)
    plan = DevicePlan(
        partial_starts_S=torch.from_numpy(np.cumsum([0, *counts])).to(DEVICE, torch.int32),
        max_partials=int(counts.sum()),
    )
    packed = replace(batch, plan=plan)
    q = floats(rng, 5, 6, 16)
    expected = _attend(q, paged, batch, window)
    assert torch.equal(_attend(q, paged, packed, window), expected)


def test_partials_are_enough_and_bounded(rng: np.random.Generator) -> None:
    lengths = np.arange(1, 70_000)
    for window in (None, 1, 1000, 1024, 4096):
        low = np.maximum(lengths - (window or 70_000), 0)
        visible = lengths - low
        size = np.select([visible <= n for n in (1024, 4096, 16384)], [64, 128, 256], 512)
        assert (-(-lengths // size) - low // size <= partial_counts(lengths, window)).all()
        assert (partial_counts(lengths, window) <= partial_counts(lengths, None)).all()
    counts = partial_counts(lengths, None)
    assert (np.diff(counts) >= 0).all()
    assert counts[::97].tolist() == [split_partials(int(length)) for length in lengths[::97]]
    for longest in (100, 3000, 40_000):
        lens = rng.integers(1, longest + 1, 50)
        for total in (partial_counts(lens, None), partial_counts(lens * 0 + longest, None)):
            assert total.sum() <= max_total_partials(50, longest, 50 * longest)
        assert partial_counts(lens, None).sum() <= max_total_partials(50, longest, int(lens.sum()))
    assert max_total_partials(256, 40_960, 130_000) <= 2560


@pytest.mark.usefixtures("_small_splits")
@pytest.mark.parametrize("window", [None, 40, 150])
def test_decodes_short_and_long_chunks_in_one_step(
    rng: np.random.Generator, window: int | None
) -> None:
    lengths, query_lens = [40, 17, 270, 200, 30], [1, 17, 13, 70, 0]
    paged = make_paged(rng, lengths, (1, 16))
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 3, 16)
    expected = exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25, window))
    assert_close(_attend(q, paged, batch, window), expected)


@pytest.mark.parametrize(
    ("group", "head_size"),
    [(1, 64), (2, 80), (3, 96), (5, 8), (8, 128), (16, 12), (1, 192), (2, 256)],
)
def test_every_head_size_and_group(rng: np.random.Generator, group: int, head_size: int) -> None:
    lengths, query_lens = [70, 90, 33], [1, 70, 9]
    paged = make_paged(rng, lengths, (2, head_size))
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 2 * group, head_size)
    q *= 4 * head_size**-0.5
    assert_close(
        _attend(q, paged, batch, None),
        exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_cache_under_float32_queries(rng: np.random.Generator, dtype: torch.dtype) -> None:
    lengths, query_lens = [1, 100, 90], [1, 1, 70]
    paged = make_paged(rng, lengths, (3, 16), dtype=dtype)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 9, 16)
    assert_close(
        _attend(q, paged, batch, None),
        exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25)),
    )


def test_float16_throughout(rng: np.random.Generator) -> None:
    lengths, query_lens = [1, 100, 90], [1, 1, 70]
    paged = make_paged(rng, lengths, (3, 16), dtype=torch.float16)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), 9, 16).half()
    found = _attend(q, paged, batch, None)
    assert found.dtype is torch.float16
    assert_close(
        found.float(),
        exact_attention(q, paged, batch, attention_op(q.shape[1], paged.layer, 0.25)),
        tolerance=3e-3,
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="NumPy's products of a row depend on its place")
def test_a_row_has_the_same_bits_in_any_long_chunk(rng: np.random.Generator) -> None:
    lengths = [200, 90]
    paged = make_paged(rng, lengths, (2, 16))
    q = floats(rng, sum(lengths), 6, 16)
    whole = _attend(q, paged, paged.batch(lengths, lengths), None)
    rows = torch.cat((torch.arange(70, 200), torch.tensor([279])))
    found = _attend(q[rows], paged, paged.batch([200, 80], [130, 1]), None)
    assert torch.equal(found[:130], whole[70:200])


def test_a_decoded_row_has_the_same_bits_in_any_batch(rng: np.random.Generator) -> None:
    paged = make_paged(rng, EDGES, (2, 16))
    q = floats(rng, len(EDGES), 6, 16)
    together = _attend(q, paged, paged.batch(EDGES, [1] * len(EDGES)), None, is_deterministic=True)
    for s in (4, 7):
        alone = [int(i == s) for i in range(len(EDGES))]
        batch = paged.batch(EDGES, alone)
        found = _attend(q[s : s + 1], paged, batch, None, is_deterministic=True)
        assert torch.equal(found[0], together[s])


def test_deterministic_chunks_have_the_bits_of_decoding(rng: np.random.Generator) -> None:
    paged = make_paged(rng, [150], (2, 16))
    q = floats(rng, 9, 4, 16)
    chunk = _attend(q, paged, paged.batch([150], [9]), 100, is_deterministic=True)
    for row in (0, 5, 8):
        batch = paged.batch([142 + row], [1])
        alone = _attend(q[row : row + 1], paged, batch, 100, is_deterministic=True)
        assert torch.equal(alone, chunk[row : row + 1])


def test_blocks_wholly_behind_the_window_are_not_read(rng: np.random.Generator) -> None:
    paged = make_paged(rng, [200], (2, 16))
    for queries in (1, 10, 70):
        batch = paged.batch([200], [queries])
        q = floats(rng, queries, 4, 16)
        expected = _attend(q, paged, batch, 40)
        freed = paged.table[0, : (200 - queries + 1 - 40) // 16].long()
        kept = paged.layer.key[freed].clone(), paged.layer.value[freed].clone()
        before = paged.table.clone()
        paged.layer.key[freed], paged.layer.value[freed] = torch.nan, torch.nan
        paged.table[0, : len(freed)] = 0
        assert torch.equal(_attend(q, paged, batch, 40), expected)
        paged.table.copy_(before)
        paged.layer.key[freed], paged.layer.value[freed] = kept


def test_padding_of_a_captured_step_gets_zeros(rng: np.random.Generator) -> None:
    paged = make_paged(rng, [20, 1], (2, 16))
    batch = paged.batch([20, 0], [1, 0])
    padded = AttentionBatch(
        positions_T=torch.tensor([19, 0], dtype=torch.int32),
        slot_mapping_T=torch.tensor([0, -1]),
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens_S=batch.seq_lens_S,
        block_table=batch.block_table,
    )
    q = floats(rng, 2, 4, 16)
    found = _attend(q, paged, padded, None)
    assert torch.equal(found[1], torch.zeros(64))
    assert_close(
        found[:1], exact_attention(q[:1], paged, batch, attention_op(q.shape[1], paged.layer, 0.25))
    )


def test_heads_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    paged = make_paged(rng, [20], (2, 16))
    with pytest.raises(ValueError, match="5 query heads of size 16 do not fit 2 kv heads"):
        _attend(floats(rng, 1, 5, 16), paged, paged.batch([20], [1]), None)


def _share(paged: PagedKV, leader: int, members: list[int], blocks: int) -> None:
    """Lets `members` read the first blocks of `leader`."""
    tokens = blocks * paged.block_size
    for s in members:
        paged.table[s, :blocks] = paged.table[leader, :blocks]
        paged.keys[s][:tokens] = paged.keys[leader][:tokens]
        paged.values[s][:tokens] = paged.values[leader][:tokens]


@pytest.mark.parametrize("window", [None, 100])
def test_shared_prefixes_are_read_once_and_merged(
    rng: np.random.Generator, window: int | None
) -> None:
    lengths, query_lens = [330, 320, 321, 70, 40, 90, 17], [1, 1, 1, 1, 1, 5, 1]
    paged = make_paged(rng, lengths, (2, 16))
    _share(paged, 0, [1, 2], 20)
    _share(paged, 3, [4], 2)
    batch = paged.batch(lengths, query_lens)
    plan = plan_shared_prefix(
        paged.table.numpy(), np.array(lengths), np.array(query_lens), TILES, min_blocks=1
    )
    assert plan is not None
    assert plan.shared_tokens.tolist() == [320, 320, 320, 32, 32, 0, 0]
    q = floats(rng, sum(query_lens), 6, 16)
    layer, moved = there(paged, batch)
    op = attention_op(q.shape[1], paged.layer, 0.25, window)
    on_device = plan.to_device(torch.device(DEVICE))
    found = shared_prefix_attention(q.to(DEVICE), op, layer, moved, on_device)
    assert_close(found.cpu(), exact_attention(q, paged, batch, op))


def test_nested_prefixes_take_the_level_that_saves_most() -> None:
    table = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 7, 8, 9], [1, 7, 8, 6], [9, 9, 9, 9]])
    lens = np.array([64, 64, 64, 64, 64])
    plan = plan_shared_prefix(table, lens, np.ones(5, int), TILES, min_blocks=1)
    assert plan is not None
    assert plan.shared_tokens.tolist() == [48, 48, 48, 48, 0]
    assert sorted(plan.members.tolist()) == [0, 1, 2, 3]
    assert plan.max_tail == 64
    wide = plan_shared_prefix(
        np.tile(table[:1], (3, 1)), lens[:3], np.ones(3, int), TILES, min_blocks=1
    )
    assert wide is not None
    assert wide.shared_tokens.tolist() == [64, 64, 64]


def test_no_plan_without_enough_to_share() -> None:
    table = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    ones, lens = np.ones(3, int), np.array([48, 48, 48])
    assert plan_shared_prefix(table, lens, ones, TILES, min_blocks=3) is None
    assert plan_shared_prefix(table, lens, ones * 2, TILES, min_blocks=1) is None
    assert plan_shared_prefix(table, np.array([48, 20, 48]), ones, TILES, min_blocks=2) is None


@pytest.mark.parametrize("norm", ["none", "head", "whole"])
@pytest.mark.parametrize("rotary_dim", [20, 8])
def test_rope_and_cache_matches_the_reference(
    rng: np.random.Generator, norm: str, rotary_dim: int
) -> None:
    heads, kv_heads, size, lengths, query_lens = 6, 2, 20, [40, 17, 5], [10, 1, 5]
    paged = make_paged(rng, lengths, (kv_heads, size))
    batch = paged.batch(lengths, query_lens)
    qkv = floats(rng, 16, (heads + 2 * kv_heads) * size)
    angles = floats(rng, 64, rotary_dim // 2)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rotary_dim)
    per_head = norm == "head"
    wide = (1, 1) if per_head else (heads, kv_heads)
    weights = [floats(rng, n * size) for n in wide]
    qk_norm = QKNorm(query=weights[0], key=weights[1], eps=1e-6, per_head=per_head)
    chosen = None if norm == "none" else qk_norm
    layer, moved = there(paged, batch)
    layer = KVLayer(key=layer.key, value=layer.value)
    on_device = None
    if chosen is not None:
        on_device = QKNorm(
            query=chosen.query.to(DEVICE), key=chosen.key.to(DEVICE), eps=1e-6, per_head=per_head
        )
    table = RopeTable(cos=rope.cos.to(DEVICE), sin=rope.sin.to(DEVICE), rotary_dim=rotary_dim)
    slots = moved.slot_mapping_T
    asked = attention_op(heads, paged.layer, 1.0, rope=table, qk_norm=on_device)
    q = rope_and_cache(qkv.to(DEVICE), asked, layer, moved).cpu()
    block, offset = slots // 16, slots % 16
    found_k, found_v = layer.key[block, offset].cpu(), layer.value[block, offset].cpu()
    assert layer.key.cpu().isnan().any(), "slots of nobody stay as they were"
    op = attention_op(heads, paged.layer, 1.0, rope=rope, qk_norm=chosen)
    expected_q = ReferenceOps(1).rope_and_cache(qkv, op, paged.layer, batch)
    block, offset = block.cpu(), offset.cpu()
    assert_close(q, expected_q.double(), tolerance=1e-6)
    assert_close(found_k, paged.layer.key[block, offset].double(), tolerance=1e-6)
    assert torch.equal(found_v, paged.layer.value[block, offset])


def test_a_negative_slot_is_written_nowhere(rng: np.random.Generator) -> None:
    paged = make_paged(rng, [5], (2, 16))
    batch = paged.batch([5], [1])
    batch.slot_mapping_T.fill_(-1)
    layer, moved = there(paged, batch)
    before = layer.key.clone()
    table = RopeTable(
        cos=torch.ones(8, 8, device=DEVICE), sin=torch.zeros(8, 8, device=DEVICE), rotary_dim=16
    )
    op = attention_op(4, paged.layer, 1.0, rope=table)
    rope_and_cache(floats(rng, 1, 8 * 16).to(DEVICE), op, layer, moved)
    assert torch.equal(before.nan_to_num(7.0), layer.key.nan_to_num(7.0))
