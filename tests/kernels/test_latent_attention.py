"""Latent attention of every back end against float64: what is kept, and what is attended."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import AttentionBatch, KVLayer, LatentOp, RopeTable
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from tests.kernels.cases import assert_close, floats
from tests.kernels.latent_cases import PagedLatents, make_latents

HEADS, RANK, NOPE, ROPE, VALUE = 4, 32, 24, 8, 16


def make_op(
    rng: np.random.Generator, ops: Ops, positions: int, device: str = "cpu"
) -> tuple[LatentOp, Tensor]:
    """Returns what a layer asks, and the numbers of its kv_b."""
    angles = floats(rng, positions, ROPE // 2).to(device)
    data = (floats(rng, HEADS * (NOPE + VALUE), RANK) / math.sqrt(RANK)).to(device)
    kv_b = Weight(data=data, format=WEIGHT_FORMATS["f32"], rows=len(data), cols=RANK)
    op = LatentOp(
        num_heads=HEADS,
        rank=RANK,
        nope_size=NOPE,
        rope_size=ROPE,
        value_size=VALUE,
        scale=0.3,
        rope=RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=ROPE),
        norm_R=floats(rng, RANK).to(device),
        norm_eps=1e-6,
        weights=ops.prepare_latent(kv_b, HEADS, NOPE),
    )
    return op, data


def _rotated(x: Tensor, op: LatentOp, positions: Tensor) -> Tensor:
    cos, sin = (part.cpu()[positions].double() for part in (op.rope.cos, op.rope.sin))
    low, high = x.double().chunk(2, -1)
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def expected_of(
    q_TN: Tensor,
    latent_TC: Tensor,
    op: LatentOp,
    kv_b: Tensor,
    paged: PagedLatents,
    batch: AttentionBatch,
) -> tuple[Tensor, Tensor]:
    """Returns [T, H * value], and what this step's tokens keep, in float64: keys and values of each
    head multiplied out."""
    positions = batch.positions_T.long().cpu()
    c = latent_TC[:, :RANK].double()
    c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + op.norm_eps) * op.norm_R.double().cpu()
    kept = torch.cat((c, _rotated(latent_TC[:, RANK:], op, positions)), -1)
    q = q_TN.view(len(q_TN), HEADS, -1)
    q = torch.cat((q[..., :NOPE].double(), _rotated(q[..., NOPE:], op, positions)), -1)
    heads = kv_b.double().cpu().view(HEADS, -1, RANK)
    parts = []
    for s, tokens in enumerate(paged.tokens):
        rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
        length = int(batch.seq_lens_S[s])
        seen = tokens[:length].double()
        seen[length - (rows.stop - rows.start) :] = kept[rows]
        both = torch.einsum("kr,hdr->khd", seen[:, :RANK], heads)
        rope = seen[:, None, RANK:].expand(-1, HEADS, -1)
        keys = torch.cat((both[..., :NOPE], rope), -1)
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * op.scale
        scores.masked_fill_(torch.arange(length) > positions[rows].unsqueeze(1), -math.inf)
        parts.append(torch.einsum("hqk,khv->qhv", scores.softmax(-1), both[..., NOPE:]).flatten(1))
    return torch.cat(parts), kept


def test_chunks_and_decodes_attend_what_is_kept(rng: np.random.Generator, ops: Ops) -> None:
    lengths, query_lens = [33, 70, 16, 90], [1, 9, 16, 1]
    paged = make_latents(rng, lengths, RANK + ROPE)
    batch = paged.batch(lengths, query_lens)
    op, kv_b = make_op(rng, ops, 128)
    total = sum(query_lens)
    wide = floats(rng, total, HEADS * (NOPE + ROPE) + RANK + ROPE)
    q_TN, latent_TC = wide.split([HEADS * (NOPE + ROPE), RANK + ROPE], dim=1)
    expected, kept = expected_of(q_TN.contiguous(), latent_TC, op, kv_b, paged, batch)
    layer = KVLayer(latent=paged.pages_BPC)
    assert_close(ops.latent_attention(q_TN, latent_TC, op, layer, batch), expected)
    slots = batch.slot_mapping_T
    assert_close(paged.pages_BPC[slots // 16, slots % 16], kept, tolerance=1e-6)


def test_bits_do_not_depend_on_the_batch(rng: np.random.Generator, native: Ops) -> None:
    ops = native
    lengths, query_lens = [33, 70], [1, 9]
    paged = make_latents(rng, lengths, RANK + ROPE)
    op, _ = make_op(rng, ops, 128)
    q_TN, latent_TC = floats(rng, 10, HEADS * (NOPE + ROPE)), floats(rng, 10, RANK + ROPE)
    layer = KVLayer(latent=paged.pages_BPC)
    whole = ops.latent_attention(q_TN, latent_TC, op, layer, paged.batch(lengths, query_lens))
    for s, rows in ((0, slice(0, 1)), (1, slice(1, 10))):
        one = replace(paged, tokens=[paged.tokens[s]], table=paged.table[s : s + 1])
        batch = one.batch([lengths[s]], [query_lens[s]])
        alone = ops.latent_attention(q_TN[rows], latent_TC[rows], op, layer, batch)
        assert torch.equal(alone, whole[rows])
