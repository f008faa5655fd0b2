"""Triton's attention over keys and values in formats with scales, against float64 on what is left
of them; and what it writes, against the specification.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import (
    AttentionBatch,
    AttentionOp,
    KeyChange,
    KVLayer,
    KVScales,
    QKNorm,
    RopeTable,
)
from octavo.kernels.kv_pages import mixed_as
from octavo.kernels.reference import ReferenceOps
from octavo.visibility import Full, Window
from tests.kernels.cases import exact_attention, floats
from tests.kernels.kv_cases import kv_op, make_stored
from tests.kernels.triton.cases import TOLERANCES, assert_near, make_ops, on_device
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention import choose, unpack  # isort: skip
from octavo.kernels.triton.attention.device_plan import DevicePlan, LongRow  # isort: skip
from octavo.kernels.triton.attention.planes import planes_of  # isort: skip
from octavo.kernels.triton.attention.shared import (  # isort: skip
    plan_shared_prefix,
    shared_prefix_attention,
)
from octavo.kernels.triton.attention.splits import tiling  # isort: skip
from octavo.kernels.triton.attention.write import rope_and_cache  # isort: skip

FORMATS = ["fp8", "int8", "int4", "int8/int4", "int4/fp8"]
DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets short sequences split at the interpreter's sizes."""
    monkeypatch.setattr(choose, "SHORT_QUERIES", 16)
    monkeypatch.setattr(choose, "SHORT_SPLITS", 4)
    monkeypatch.setattr(choose, "SHORTEST_SPLIT", 128)
    monkeypatch.setattr(choose, "SHORT_TOKENS", 32)


PAGE_BYTES = 2 * 16 * 2 * 64 * 4
"""Of keys and values in float32, of the cases below."""


def long_row(index: int, first_token: int, num_tokens: int, seq_len: int) -> LongRow:
    end = first_token + num_tokens
    return LongRow(index=index, first_token=first_token, end_token=end, seq_len=seq_len)


def attend(
    q: Tensor, layer: KVLayer, op: AttentionOp, batch: AttentionBatch, **options: bool
) -> Tensor:
    mixed = mixed_as(layer, "key", q.float()).to(DEVICE, q.dtype)
    return choose.attention(mixed, op, *on_device(layer, batch), **options).cpu()


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        *(("in any kernel", name, torch.float32) for name in FORMATS),
        *(("in any kernel", name, dtype) for name in FORMATS[:3] for dtype in DTYPES[1:]),
        ("unpacked", "int8", torch.float32),
        ("unpacked", "int4", torch.float32),
        ("unpacked, those of few queries first", "int8/int4", torch.float32),
        ("unpacked", "int4/fp8", torch.float16),
        ("unpacked in parts", "int8/int4", torch.float32),
    ],
    ids=str,
)
def test_decodes_short_and_long_chunks_in_one_step(
    rng: np.random.Generator,
    form: str,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form.startswith("unpacked"):
        monkeypatch.setattr(choose, "MAX_PADDED_TOKENS", 16)
    lengths, query_lens = [70, 150, 33, 5], [1, 4, 18, 0]
    if form.endswith("parts"):
        lengths, query_lens = [70, 150, 33, 40, 5, 150], [1, 4, 18, 17, 0, 20]
    paged = make_stored(rng, lengths, (2, 64), name)
    batch = paged.batch(lengths, query_lens)
    if form.endswith("first"):
        batch = replace(batch, plan=DevicePlan(num_short_tokens=5, num_few_tokens=5))
    if form.endswith("parts"):
        rows = long_row(2, 5, 18, 33), long_row(3, 23, 17, 40), long_row(5, 40, 20, 150)
        batch = replace(batch, plan=DevicePlan(num_few_tokens=5, long_rows=rows))
        monkeypatch.setattr(unpack, "UNPACKED_BYTES", 10 * PAGE_BYTES)
        assert [len(group) for group in unpack.groups_of(rows, 16, 10) or ()] == [2, 1]
    q = floats(rng, sum(query_lens), 6, 64).to(dtype)
    op = kv_op(6, (2, 64))
    found = attend(q, paged.layer, op, batch)
    assert_near(found, exact_attention(q, paged, batch, op), TOLERANCES[dtype])


def test_room_is_taken_for_sequences_of_many_queries_alone(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long others are that decode beside them."""
    lengths, query_lens = [150, 33, 140], [1, 18, 1]
    paged = make_stored(rng, lengths, (2, 64), "int8")
    layer, batch = on_device(paged.layer, paged.batch(lengths, query_lens))
    q = floats(rng, sum(query_lens), 6, 64).to(DEVICE)
    monkeypatch.setattr(unpack, "UNPACKED_BYTES", 3 * PAGE_BYTES)
    assert unpack.unpack_long_chunks(q, layer, batch, short=16) is None
    plan = DevicePlan(max_seq_len=150, long_rows=(long_row(1, 1, 18, 33),))
    parts = unpack.unpack_long_chunks(q, layer, replace(batch, plan=plan), short=16)
    assert parts is not None
    (part,) = parts
    values = part.layer.value[part.batch.block_table[1, :3].long()].flatten(0, 1)[:33]
    torch.testing.assert_close(values.cpu(), paged.values[1].float(), rtol=1e-5, atol=1e-5)


def test_sequences_are_unpacked_together_while_there_is_room() -> None:
    def lens(room: int) -> list[list[int]] | None:
        rows = [long_row(i, 0, 0, 16 * pages) for i, pages in enumerate((3, 1, 8, 2, 2, 2))]
        groups = unpack.groups_of(rows, 16, room)
        if groups is None:
            return None
        return [[row.seq_len // 16 for row in group] for group in groups]

    assert lens(48) == [[3, 1, 8, 2, 2, 2]]
    assert lens(8) == [[3, 1], [8], [2, 2, 2]]
    assert lens(7) is None


def test_every_row_as_if_decoded(rng: np.random.Generator) -> None:
    lengths, query_lens = [40, 20], [1, 2]
    paged = make_stored(rng, lengths, (2, 64), "int8/int4")
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, 3, 6, 64)
    op = kv_op(6, (2, 64))
    found = attend(q, paged.layer, op, batch, is_deterministic=True)
    assert_near(found, exact_attention(q, paged, batch, op), TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("name", "head_size", "window"),
    [("int8", 96, None), ("fp8", 80, 40), ("int4", 192, 40), ("int4", 128, None)],
)
def test_head_sizes_and_windows(
    rng: np.random.Generator, name: str, head_size: int, window: int | None
) -> None:
    lengths, query_lens = [70, 40], [1, 18]
    paged = make_stored(rng, lengths, (1, head_size), name)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, 19, 2, head_size)
    visibility = Full() if window is None else Window(window)
    op = kv_op(2, (1, head_size), visibility=visibility, soft_cap=20.0)
    expected = exact_attention(q, paged, batch, op)
    assert_near(attend(q, paged.layer, op, batch), expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_shared_prefixes(rng: np.random.Generator, name: str) -> None:
    lengths = [150, 131, 140]
    paged = make_stored(rng, lengths, (2, 64), name)
    for s in (1, 2):
        paged.table[s, :8] = paged.table[0, :8]
        paged.keys[s][:128], paged.values[s][:128] = paged.keys[0][:128], paged.values[0][:128]
    batch = paged.batch(lengths, [1, 1, 1])
    plan = plan_shared_prefix(
        paged.table.numpy(), np.array(lengths), np.ones(3, int), tiling(6, 2, 132), min_blocks=1
    )
    assert plan is not None
    assert plan.shared_tokens.tolist() == [128] * 3
    q = floats(rng, 3, 6, 64)
    op = kv_op(6, (2, 64))
    mixed, prefix = mixed_as(paged.layer, "key", q).to(DEVICE), plan.to_device(torch.device(DEVICE))
    found = shared_prefix_attention(mixed, op, *on_device(paged.layer, batch), prefix)
    expected = exact_attention(q, paged, batch, op)
    assert_near(found.cpu(), expected, TOLERANCES[torch.float32])


def asked(rng: np.random.Generator, norm: str, *, is_balanced: bool = True) -> AttentionOp:
    size = 64
    angles = floats(rng, 64, size // 2).to(DEVICE)
    wide = (1, 1) if norm == "head" else (6, 2)
    query, key = (floats(rng, n * size).to(DEVICE) for n in wide)
    qk_norm = QKNorm(query=query, key=key, eps=1e-6, per_head=norm == "head")
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=size)
    shift = 3 * floats(rng, 2, size).to(DEVICE)
    factor = floats(rng, 2, size).exp().to(DEVICE) if is_balanced else None
    change = KeyChange(shift_KD=shift, factor_KD=factor)
    return replace(kv_op(6, (2, size)), rope=rope, qk_norm=qk_norm, key_change=change)


def on_host(op: AttentionOp) -> AttentionOp:
    rope, norm, given, change = op.rope, op.qk_norm, op.kv_scales, op.key_change
    assert rope is not None
    assert norm is not None
    assert change is not None
    return replace(
        op,
        rope=replace(rope, cos=rope.cos.cpu(), sin=rope.sin.cpu()),
        qk_norm=replace(norm, query=norm.query.cpu(), key=norm.key.cpu()),
        kv_scales=given and KVScales(key_K=given.key_K.cpu(), value_K=given.value_K.cpu()),
        key_change=KeyChange(
            shift_KD=change.shift_KD.cpu(),
            factor_KD=None if change.factor_KD is None else change.factor_KD.cpu(),
        ),
    )


@pytest.mark.parametrize(
    ("name", "norm", "has_scales"),
    [
        ("fp8", "head", False),
        ("fp8", "whole", True),
        ("int8", "whole", False),
        ("int4", "head", False),
        ("int8/int4", "whole", False),
    ],
)
def test_what_is_written_is_what_the_specification_writes(
    rng: np.random.Generator, name: str, norm: str, has_scales: bool
) -> None:
    lengths, query_lens = [40, 17], [3, 2]
    paged = make_stored(rng, lengths, (2, 64), name)
    layer = paged.layer
    batch = paged.batch(lengths, query_lens)
    batch.slot_mapping_T[1] = -1
    qkv = floats(rng, 5, (6 + 2 * 2) * 64)
    qkv[2, 6 * 64 : 7 * 64] = 0.0
    qkv[3, 8 * 64] = torch.inf
    op = asked(rng, norm, is_balanced=not has_scales)
    if has_scales:
        given = KVScales(
            key_K=torch.tensor([0.01, 0.002], device=DEVICE),
            value_K=torch.tensor([0.004, 0.02], device=DEVICE),
        )
        op = replace(op, kv_scales=given)
    there, moved = on_device(layer, batch, copy=True)
    q = rope_and_cache(qkv.to(DEVICE), op, there, moved).cpu()
    keep = torch.tensor([0, 2, 3, 4])
    part = replace(
        batch, positions_T=batch.positions_T[keep], slot_mapping_T=batch.slot_mapping_T[keep]
    )
    expected_q = ReferenceOps(1).rope_and_cache(qkv[keep], on_host(op), layer, part)
    assert_near(q[keep], expected_q, 1e-6)
    slots = batch.slot_mapping_T[keep]
    at, untouched = (slots // 16, slots % 16), torch.ones(*layer.key.shape[:2], dtype=torch.bool)
    untouched[at] = False
    for plane, expected in layer.planes.items():
        found = there.planes[plane].cpu()
        assert torch.equal(
            found[untouched].view(torch.uint8), expected[untouched].view(torch.uint8)
        )
        if plane.endswith("_scale"):
            is_kept = expected[at].isfinite()
            assert torch.equal(found[at].isfinite(), is_kept)
            # One more or less in the last place of a float32 may round another way.
            assert torch.allclose(found[at][is_kept], expected[at][is_kept], rtol=0.01)
            continue
        is_kept = layer.planes[f"{plane}_scale"][at].isfinite().all(-1)
        equal = found[at][is_kept].view(torch.uint8) == expected[at][is_kept].view(torch.uint8)
        assert equal.float().mean() > 0.99


@pytest.mark.parametrize("name", FORMATS)
def test_a_decode_writes_and_attends_at_once(rng: np.random.Generator, name: str) -> None:
    lengths = [60, 33, 1]
    paged = make_stored(rng, lengths, (2, 64), name)
    layer = paged.layer
    batch = paged.batch(lengths, [1, 1, 1])
    qkv, op = floats(rng, 3, (6 + 2 * 2) * 64).to(DEVICE), asked(rng, "head")
    there, moved = on_device(layer, batch, copy=True)
    found = make_ops(is_deterministic=False).rope_attention(qkv, op, there, moved)
    expected = ReferenceOps(1).rope_attention(qkv.cpu(), on_host(op), layer, batch)
    assert_near(found.cpu(), expected, 2e-3)
    at = batch.slot_mapping_T // 16, batch.slot_mapping_T % 16
    for plane, wanted in layer.planes.items():
        written = there.planes[plane].cpu()[at].view(torch.uint8)
        assert (written == wanted[at].view(torch.uint8)).float().mean() > 0.99


def test_pages_that_lie_otherwise_are_refused(rng: np.random.Generator) -> None:
    paged = make_stored(rng, [20], (2, 64), "int4")
    layer = paged.layer
    batch, q = paged.batch([20], [1]), floats(rng, 1, 2, 64)
    wrong = KVLayer(**layer.planes | {"key": layer.key[..., :16]})
    with pytest.raises(ValueError, match="key pages must be views"):
        planes_of(q, wrong, batch)
