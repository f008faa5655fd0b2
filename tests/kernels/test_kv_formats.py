"""KV in formats with scales: what is written, and attention over it against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.formats import KV_FORMATS, WEIGHT_FORMATS, KVFormat
from octavo.kernels.inputs import (
    AttentionBatch,
    AttentionOp,
    KeyChange,
    KVLayer,
    KVScales,
    LatentOp,
    QKNorm,
    RopeTable,
)
from octavo.kernels.kv_codec import dequantize, mix, quantize, stored_format
from octavo.kernels.kv_pages import mixed_as, read_vectors
from octavo.kernels.ops import Ops
from octavo.kernels.reference import ReferenceOps
from octavo.kernels.weights import Weight
from octavo.kv_cache.spec import group_layers, latent_kv
from octavo.kv_cache.storage import KVStorage
from octavo.visibility import Chunk, Window
from tests.kernels.cases import assert_close, exact_attention, floats
from tests.kernels.kv_cases import PAIRS, kv_op, make_stored, raw, slots_of, stored

QUANTIZED = [name for name, one in KV_FORMATS.items() if one.is_quantized]
WORST = {"fp8": 1 / 16, "int8": 1 / 250, "int4": 1 / 11}
"""Of the largest number that shares a scale."""


@pytest.mark.parametrize("name", QUANTIZED)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-100, 100))
def test_numbers_come_back_within_a_step(name: str, seed: int, exponent: int) -> None:
    stored_as = KV_FORMATS[name]
    x = torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    numbers, scales = quantize(x, stored_as)
    assert stored_format(numbers) == stored_as
    assert numbers.nelement() * numbers.element_size() * 8 == x.nelement() * stored_as.bits
    assert scales.shape == (3, 2, stored_as.num_scales(128))
    found = dequantize(numbers, scales)
    largest = x.view(*scales.shape, -1).abs().amax(-1, keepdim=True)
    error = (found - x).view(*scales.shape, -1).abs()
    assert (error <= WORST[name] * largest).all()


@pytest.mark.parametrize("size", [64, 128, 192])
def test_vectors_of_int4_are_as_long_along_themselves_as_they_were(
    size: int, rng: np.random.Generator
) -> None:
    x = mix(floats(rng, 500, size) + 3 * floats(rng, size))
    found = dequantize(*quantize(x, KV_FORMATS["int4"])).double()
    along = (found * x).sum(-1) / x.double().square().sum(-1)
    assert (along - 1).abs().max() < 2**-8
    assert abs(float(along.mean()) - 1) < 2e-4


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_stay_and_what_is_no_number_spoils_its_scale(name: str) -> None:
    x = torch.zeros(4, 128)
    x[1, 5], x[2, 5], x[3, 5] = torch.nan, torch.inf, -torch.inf
    found = dequantize(*quantize(x, KV_FORMATS[name]))
    assert (found[0] == 0).all()
    assert found[1:, :32].isnan().all()


@pytest.mark.parametrize("size", [2, 24, 64, 80, 128, 192, 512])
def test_mixing_is_its_own_inverse_and_keeps_dot_products(
    size: int, rng: np.random.Generator
) -> None:
    x, y = floats(rng, 5, size), floats(rng, 5, size)
    assert_close(mix(mix(x)), x.double())
    assert_close((mix(x) * mix(y)).sum(-1), (x.double() * y.double()).sum(-1), 1e-4)
    spike = torch.zeros(1, 128)
    spike[0, 77] = 1
    assert torch.allclose(mix(spike).abs(), torch.tensor(128**-0.5))


def attended(ops: Ops, q: Tensor, op: AttentionOp, paged, batch) -> Tensor:
    return ops.attention(mixed_as(paged.layer, "key", q), op, paged.layer, batch)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_over_every_pair_of_formats(
    ops: Ops, rng: np.random.Generator, formats: str, decode: bool, group: int
) -> None:
    lengths, sizes = [1, 17, 64, 65, 300], (2, 64)
    query_lens = [1 if decode else int(rng.integers(1, min(n, 40) + 1)) for n in lengths]
    paged = make_stored(rng, lengths, sizes, formats)
    batch = paged.batch(lengths, query_lens)
    q, op = floats(rng, sum(query_lens), 2 * group, 64), kv_op(2 * group, sizes)
    found = attended(ops, q, op, paged, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize(
    ("formats", "head_size"),
    [*(("int8", n) for n in (8, 12, 80, 256)), ("fp8", 12), ("fp8", 128), ("int4", 192)],
)
def test_head_sizes(ops: Ops, rng: np.random.Generator, formats: str, head_size: int) -> None:
    lengths, query_lens = [70, 33], [1, 33]
    paged = make_stored(rng, lengths, (1, head_size), formats)
    batch = paged.batch(lengths, query_lens)
    q, op = floats(rng, 34, 2, head_size), kv_op(2, (1, head_size))
    found = attended(ops, q, op, paged, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("formats", ["int8", "int4"])
@pytest.mark.parametrize("visibility", [Window(20), Chunk(48)], ids=str)
def test_windows_sinks_and_caps(
    ops: Ops, rng: np.random.Generator, formats: str, visibility: Window | Chunk
) -> None:
    lengths, query_lens = [20, 49, 200], [1, 9, 200]
    paged = make_stored(rng, lengths, (2, 64), formats)
    batch = paged.batch(lengths, query_lens)
    q, sinks = floats(rng, 210, 6, 64), floats(rng, 6)
    op = kv_op(6, (2, 64), visibility=visibility, sinks_H=sinks, soft_cap=3.0)
    found = attended(ops, q, op, paged, batch)
    assert_close(found, exact_attention(q, paged, batch, op))


@pytest.mark.parametrize("formats", [*QUANTIZED, "int8/int4"])
@pytest.mark.parametrize("has_norm", [True, False])
def test_native_writes_what_the_reference_writes(
    native: Ops, rng: np.random.Generator, formats: str, has_norm: bool
) -> None:
    sizes, length, op = (2, 64), 45, kv_op(4, (2, 64))
    op = dataclasses.replace(op, rope=_rope(rng, length), qk_norm=_norm(rng) if has_norm else None)
    state = np.random.default_rng(1)
    layers, queries = [], []
    for ops in (native, ReferenceOps(1)):
        state = np.random.default_rng(1)
        paged = make_stored(state, [length], sizes, formats, is_written=False)
        qkv = floats(state, length, 8 * 64)
        qkv[3, 5 * 64 :] = 0
        queries.append(ops.rope_and_cache(qkv, op, paged.layer, paged.batch([length], [length])))
        layers.append((paged, raw(paged.layer)))
    assert_close(queries[0], queries[1].double())
    for name, found in layers[0][1].items():
        same = (found == layers[1][1][name]).float().mean()
        assert same > 0.995 if has_norm or name in ("key", "key_scale") else same == 1, name
    for name in ("key", "value"):
        found, expected = (stored(paged, name, 0, length) for paged, _ in layers)
        step = 0.2 if "int4" in formats else 0.1 if formats == "fp8" else 0.02
        assert (found - expected).abs().max() <= step * expected.abs().max()
        assert found.isfinite().all()


def _rope(rng: np.random.Generator, positions: int) -> RopeTable:
    angles = floats(rng, positions, 16)
    return RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=32)


def _norm(rng: np.random.Generator) -> QKNorm:
    return QKNorm(query=floats(rng, 64), key=floats(rng, 64), eps=1e-6, per_head=True)


@pytest.mark.parametrize("formats", [*QUANTIZED, "int8/int4"])
def test_written_and_read_again_with_poison_around(
    ops: Ops, rng: np.random.Generator, formats: str
) -> None:
    sizes, lengths = (2, 64), [21, 64]
    paged = make_stored(rng, lengths, sizes, formats, is_written=False)
    op, batch = kv_op(6, sizes), paged.batch(lengths, lengths)
    qkv = floats(rng, 85, 10 * 64)
    found = ops.rope_attention(qkv, op, paged.layer, batch)
    paged.keys[:] = [stored(paged, "key", s, n) for s, n in enumerate(lengths)]
    paged.values[:] = [stored(paged, "value", s, n) for s, n in enumerate(lengths)]
    assert_close(found, exact_attention(qkv[:, : 6 * 64].reshape(-1, 6, 64), paged, batch, op))
    error = paged.keys[1] - qkv[21:, 6 * 64 : 8 * 64].view(-1, 2, 64)
    assert error.square().mean() < 0.011, "a key is not near what was written"


@pytest.mark.parametrize("formats", PAIRS)
def test_bits_do_not_depend_on_chunks_and_batches(
    native: Ops, rng: np.random.Generator, formats: str
) -> None:
    length, sizes, op = 300, (2, 64), kv_op(6, (2, 64))
    qkv, whole = floats(rng, length, 10 * 64), []
    for cut in ([300], [1, 299], [64, 67, 169], [*([1] * 20), 280]):
        state = np.random.default_rng(2)
        paged = make_stored(state, [length, 40], sizes, formats, is_written=False)
        parts, done = [], 0
        for count in cut:
            batch = paged.batch([done + count], [count])
            rows = qkv[done : done + count]
            parts.append(native.rope_attention(rows, op, paged.layer, batch))
            done += count
        whole.append((torch.cat(parts), {n: p.clone() for n, p in raw(paged.layer).items()}))
    for found, planes in whole[1:]:
        assert torch.equal(found, whole[0][0])
        for name, plane in planes.items():
            assert torch.equal(plane, whole[0][1][name])
    other = ReferenceOps(1).rope_attention(qkv, op, paged.layer, paged.batch([length], [length]))
    assert_close(other, whole[0][0].double(), 0.02)


def test_scales_of_a_checkpoint_are_kept_and_clamp(ops: Ops, rng: np.random.Generator) -> None:
    paged = make_stored(rng, [20], (2, 64), "fp8", is_written=False)
    scales = KVScales(key_K=torch.tensor([0.5, 0.0078125]), value_K=torch.tensor([0.25, 1.0]))
    op = dataclasses.replace(kv_op(2, (2, 64)), kv_scales=scales)
    qkv = floats(rng, 20, 6 * 64) * 3
    ops.rope_and_cache(qkv, op, paged.layer, paged.batch([20], [20]))
    at = slots_of(paged, 0, 20)
    for name, expected in (("key", scales.key_K), ("value", scales.value_K)):
        kept = paged.layer.planes[f"{name}_scale"].flatten(0, 1)[at]
        assert torch.equal(kept.float(), expected.view(1, 2, 1).expand(20, 2, 1))
    keys = stored(paged, "key", 0, 20)
    written = qkv[:, 128:256].view(20, 2, 64)
    limit = torch.tensor([224.0, 3.5]).view(1, 2, 1)
    assert ((keys - written.clamp(-limit, limit)).abs() <= 0.5).all()
    assert (keys[:, 1].abs() == 3.5).any()


@pytest.mark.parametrize("formats", ["int8", "fp8", "int4"])
def test_what_all_keys_have_in_common_may_be_taken_off(
    ops: Ops, rng: np.random.Generator, formats: str
) -> None:
    shift = torch.zeros(2, 64)
    shift[:, 5], shift[:, 40] = 60.0, -80.0
    op = dataclasses.replace(kv_op(4, (2, 64)), scale=0.05)
    qkv = floats(rng, 50, 8 * 64)
    qkv[:, 4 * 64 : 6 * 64] += shift.flatten()
    results = {}
    change = KeyChange(shift_KD=shift)
    for name, one in (
        ("float32", op),
        (formats, op),
        ("shifted", dataclasses.replace(op, key_change=change)),
    ):
        stored_as = formats if name == "shifted" else name
        paged = make_stored(rng, [50], (2, 64), stored_as, is_written=False)
        batch = paged.batch([50], [50])
        results[name] = ops.rope_attention(qkv, one, paged.layer, batch)
    exact = results.pop("float32")
    errors = {name: (found - exact).square().mean().sqrt() for name, found in results.items()}
    assert errors["shifted"] < 0.05
    assert errors["shifted"] < errors[formats] / 2


def test_a_format_needs_vectors_that_it_can_pack() -> None:
    assert [n for n in (8, 64, 80, 128, 576) if KV_FORMATS["int4"].takes(n)] == [64, 128, 576]
    assert KV_FORMATS["int8"].takes(12)
    assert not KVFormat(name="bfloat16", bits=16).is_mixed


@pytest.mark.parametrize("formats", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("num_heads", [2, 16])
def test_latent_vectors_in_two_parts(
    ops: Ops, rng: np.random.Generator, formats: str, num_heads: int
) -> None:
    rank, rope, nope, value = 128, 64, 16, 24
    data = floats(rng, num_heads * (nope + value), rank) / rank**0.5
    kv_b = Weight(data=data, format=WEIGHT_FORMATS["f32"], rows=len(data), cols=rank)
    angles = floats(rng, 200, rope // 2)
    op = LatentOp(
        num_heads=num_heads,
        rank=rank,
        nope_size=nope,
        rope_size=rope,
        value_size=value,
        scale=0.2,
        rope=RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rope),
        norm_R=torch.ones(rank),
        norm_eps=1e-6,
        weights=ops.prepare_latent(kv_b, num_heads, nope),
    )
    spec = latent_kv(rank, rope, KV_FORMATS[formats])
    storage = KVStorage(group_layers((spec,)), 20, 16)
    storage.arena.fill_(0xFF)
    table = torch.from_numpy(rng.permutation(20)[:10]).to(torch.int32).view(1, -1)
    layer, parts, done = storage.layer(0), [], 0
    q, latent = floats(rng, 150, num_heads * (nope + rope)), floats(rng, 150, rank + rope)
    latent[:, rank:] *= 9  # the parts have scales of their own
    for count in (100, 1, 49):
        at = torch.arange(done, done + count)
        batch = AttentionBatch(
            positions_T=at.to(torch.int32),
            slot_mapping_T=table[0, at // 16].long() * 16 + at % 16,
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            seq_lens_S=torch.tensor([done + count], dtype=torch.int32),
            block_table=table,
        )
        parts.append(ops.latent_attention(q[at], latent[at], op, layer, batch))
        done += count
    vectors = KVLayer((rank, rope), **layer.planes)
    kept = mixed_as(vectors, "latent", read_vectors(vectors, "latent", table[0].long()))
    kept = kept.flatten(0, 1)[:150].double()
    c = latent[:, :rank] * torch.rsqrt(latent[:, :rank].square().mean(-1, keepdim=True) + 1e-6)
    near = (kept[:, :rank] - c).square().mean()
    assert near < {"fp8": 1e-3, "int8": 2e-4, "int4": 0.011}[formats]
    both = torch.einsum("kr,hdr->khd", kept[:, :rank], data.double().view(num_heads, -1, rank))
    turned = kept[:, None, rank:].expand(-1, num_heads, -1)
    keys, values = torch.cat((both[..., :nope], turned), -1), both[..., nope:]
    queries = q.view(150, num_heads, -1).double()
    low, high = queries[..., nope:].chunk(2, -1)
    cos, sin = (part[:150, None].double() for part in (op.rope.cos, op.rope.sin))
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    scores = torch.einsum("qhd,khd->hqk", torch.cat((queries[..., :nope], rotated), -1), keys) * 0.2
    scores.masked_fill_(torch.arange(150) > torch.arange(150).unsqueeze(1), -torch.inf)
    expected = torch.einsum("hqk,khv->qhv", scores.softmax(-1), values).flatten(1)
    assert_close(torch.cat(parts), expected)
