"""Latent attention's kernels against float64: absorbed and expanded, split, shared and packed.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import KVLayer, RopeTable
from octavo.visibility import Full
from tests.kernels.cases import floats
from tests.kernels.latent_cases import P, PagedLatents, exact, make_latents
from tests.kernels.triton.cases import TOLERANCES, assert_near
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.facts import lone_partials  # isort: skip
from octavo.kernels.triton.attention.partials import make_partials  # isort: skip
from octavo.kernels.triton.attention.scores import plain_scores  # isort: skip
from octavo.kernels.triton.latent.decode import latent_decode  # isort: skip
from octavo.kernels.triton.latent.pages import LatentPlane, latent_plane  # isort: skip
from octavo.kernels.triton.latent.shared import shared_latents  # isort: skip
from octavo.kernels.triton.latent.tiles import Chunks, absorbed_chunks, expanded_chunks  # isort: skip
from octavo.kernels.triton.latent.heads import head_product  # isort: skip
from octavo.kernels.triton.latent.write import write_latents  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix  # isort: skip
from octavo.kernels.triton.attention.short_chunks import (  # isort: skip
    Limits,
    merge_short_chunks,
    plan_short_chunks,
)
from octavo.kernels.triton.attention.splits import Tiling  # isort: skip


DTYPES = list(TOLERANCES)
SHAPES = [(4, 32, 16), (6, 24, 8), (16, 32, 16)]
"""Heads, rank, rotated columns."""


def plane_of(latents: PagedLatents, rank: int) -> LatentPlane:
    pages = latents.pages_BPC
    return latent_plane(KVLayer(latent=pages), rank, pages.shape[2] - rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES)
@pytest.mark.parametrize("is_invariant", [False, True])
def test_decode(
    rng: np.random.Generator,
    heads: int,
    rank: int,
    rope: int,
    dtype: torch.dtype,
    is_invariant: bool,
) -> None:
    lengths = [1, 15, 16, 65, 200, 700]
    latents = make_latents(rng, lengths, rank + rope, dtype, device=DEVICE)
    batch = latents.batch(lengths, [1] * len(lengths))
    q = floats(rng, len(lengths), heads, rank + rope).to(DEVICE, dtype)
    out = torch.full((len(lengths), heads, rank), math.nan, dtype=dtype, device=DEVICE)
    latent_decode(
        *(q, plane_of(latents, rank), batch, 0.2, out),
        max_seq_len=max(lengths),
        is_invariant=is_invariant,
    )
    assert_near(out, exact(q, latents, batch, 0.2, rank), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES)
def test_short_chunks_in_splits(
    rng: np.random.Generator, heads: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    lengths, query_lens = [40, 300, 17, 520], [2, 9, 17, 5]
    latents = make_latents(rng, lengths, rank + rope, dtype, device=DEVICE)
    batch = latents.batch(lengths, query_lens)
    total = sum(query_lens)
    q = floats(rng, total, heads, rank + rope).to(DEVICE, dtype)
    limits = Limits(queries=64, splits=4, shortest=128, partials=total * 4)
    plan = plan_short_chunks(batch, Tiling(heads, min(heads & -heads, 64), 132), Full(), limits)
    out = torch.full((total, heads, rank), math.nan, dtype=dtype, device=DEVICE)
    partials = make_partials(out, 4)
    absorbed_chunks(q, plane_of(latents, rank), batch, 0.2, out, partials, plan, total)
    merge_short_chunks(out, plain_scores(0.2, plan.table), batch, plan, partials, total)
    assert_near(out, exact(q, latents, batch, 0.2, rank), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1, 1], [1, 7, 1, 1, 1]], ids=str)
def test_shared_prefix_is_what_each_sees_alone(
    rng: np.random.Generator, query_lens: list[int], dtype: torch.dtype
) -> None:
    lengths, heads, rank, rope = [300, 257, 256, 300, 280], 4, 32, 16
    latents = make_latents(rng, lengths, rank + rope, dtype, shared=256, device=DEVICE)
    batch = latents.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), heads, rank + rope).to(DEVICE, dtype)
    plan = plan_shared_prefix(
        latents.table.numpy(),
        np.array(lengths, np.int32),
        np.array(query_lens, np.int32),
        Tiling(heads, 4, 132),
        min_blocks=4,
    )
    assert plan is not None
    prefix = plan.to_device(torch.device(DEVICE))
    out = torch.full((len(q), heads, rank), math.nan, dtype=dtype, device=DEVICE)
    most = prefix.max_splits + lone_partials(len(lengths), prefix.max_tail)
    partials = make_partials(out, most, None, len(lengths) * most)
    shared_latents(q, plane_of(latents, rank), batch, 0.2, prefix, partials)
    latent_decode(
        *(q, plane_of(latents, rank), batch, 0.2, out),
        max_seq_len=prefix.max_tail,
        shared=(prefix.shared_tokens_S, prefix.shared_partials_S),
        partials=partials,
    )
    lone = np.repeat(query_lens, query_lens) == 1
    assert_near(out[lone], exact(q, latents, batch, 0.2, rank)[lone], TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nope", "value"), [(16, 16), (24, 40)])
@pytest.mark.parametrize("edges", [(0, 160), (0, 64, 128, 160)])
def test_expanded_chunks_over_ranges_of_keys(
    rng: np.random.Generator, nope: int, value: int, edges: tuple[int, ...], dtype: torch.dtype
) -> None:
    lengths, query_lens, heads, rank, rope = [90, 160, 3], [70, 100, 3], 4, 32, 16
    latents = make_latents(rng, lengths, rank + rope, dtype, device=DEVICE)
    batch = latents.batch(lengths, query_lens)
    total = sum(query_lens)
    q = floats(rng, total, heads, nope + rope).to(DEVICE, dtype)
    up, down = floats(rng, heads, nope, rank).to(dtype), floats(rng, heads, value, rank).to(dtype)
    out = torch.full((total, heads, value), math.nan, dtype=dtype, device=DEVICE)
    lse = torch.full((total, heads), -math.inf, device=DEVICE)
    for first, beyond in pairwise(edges):
        dense = [tokens[first:beyond].float() for tokens in latents.tokens]
        starts = torch.tensor([0, *map(len, dense)]).cumsum(0)[:-1].to(DEVICE, torch.int32)
        all_NC, both_HNR = torch.cat(dense), torch.cat((up, down), 1).float()
        both = torch.einsum("nr,hdr->nhd", all_NC[:, :rank], both_HNR)
        keys, values = both.contiguous().to(DEVICE, dtype).split([nope, value], dim=2)
        chunks = Chunks(
            query_starts=batch.query_starts,
            seq_lens=batch.seq_lens_S,
            lows=torch.zeros_like(starts),
            ends=batch.seq_lens_S,
            dense_starts=starts,
            short=64,
        )
        expanded_chunks(
            *(q.split([nope, rope], dim=2), plane_of(latents, rank), keys, values),
            *(all_NC[:, rank:].to(DEVICE, dtype), chunks, 0.2, out, lse, (first, beyond)),
            has_before=len(edges) > 2,
        )
    found = out[:170]
    absorbed = torch.einsum("thd,hdr->thr", q[..., :nope].double().cpu(), up.double())
    whole = torch.cat((absorbed, q[..., nope:].double().cpu()), -1)
    expected = torch.einsum("thr,hvr->thv", exact(whole, latents, batch, 0.2, rank), down.double())
    assert_near(found, expected[:170], TOLERANCES[dtype] * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("is_interleaved", "absorbed"), [(False, 1), (True, 3), (False, 5)])
@pytest.mark.parametrize(("heads", "nope", "rank", "rope"), [(4, 16, 32, 16), (20, 24, 24, 8)])
def test_pages_and_queries_are_normed_rotated_and_written(
    rng: np.random.Generator,
    heads: int,
    nope: int,
    rank: int,
    rope: int,
    is_interleaved: bool,
    absorbed: int,
    dtype: torch.dtype,
) -> None:
    count, half = 5, rope // 2
    q = floats(rng, count, heads, nope + rope).to(DEVICE, dtype)
    wide = floats(rng, count, rank + rope + 8).to(DEVICE, dtype)
    latent, norm = wide[:, : rank + rope], floats(rng, rank).to(DEVICE)
    angles = floats(rng, 64, half).to(DEVICE)
    table = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=rope)
    positions = torch.tensor([3, 60, 0, 7, 9], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([17, 40, -1, 3, 63], dtype=torch.int64, device=DEVICE)
    pages = torch.full((4, 2, P, rank + rope), math.nan, dtype=dtype, device=DEVICE)[:, 1]
    q_out = torch.full((count, heads, rank + rope), math.nan, dtype=dtype, device=DEVICE)
    keys = floats(rng, heads, nope, rank).to(DEVICE, dtype)
    write_latents(
        *(q, latent, latent_plane(KVLayer(latent=pages), rank, rope), norm, 1e-6, table),
        *(positions, slots, q_out, keys),
        num_absorbed=absorbed,
        is_interleaved=is_interleaved,
    )

    def rotated(x: Tensor) -> Tensor:
        x = x.double()
        a, b = (x[..., ::2], x[..., 1::2]) if is_interleaved else (x[..., :half], x[..., half:])
        cos, sin = (part[positions.long()].double() for part in (table.cos, table.sin))
        if x.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    assert q_out[absorbed:, :, :rank].isnan().all()
    product = torch.einsum("thn,hnr->thr", q[:absorbed, :, :nope].double(), keys.double())
    assert_near(q_out[:absorbed, :, :rank], product, TOLERANCES[dtype] * 4)
    assert_near(q_out[..., rank:], rotated(q[..., nope:]), TOLERANCES[dtype])
    c = latent[:, :rank].double()
    c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    expected = torch.cat((c, rotated(latent[:, rank:])), -1)
    flat = pages.reshape(-1, rank + rope)
    live = slots >= 0
    assert_near(flat[slots[live]], expected[live], TOLERANCES[dtype])
    assert int(flat.isnan().all(1).sum()) == len(flat) - int(live.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 17, 80])
def test_products_of_heads_in_rows_of_wider_tensors(
    rng: np.random.Generator, count: int, dtype: torch.dtype
) -> None:
    x = floats(rng, count, 3, 40).to(DEVICE, dtype)[..., :24]
    weight = floats(rng, 3, 24, 72).to(DEVICE, dtype)
    expected = torch.einsum("thk,hkn->thn", x.double(), weight.double())
    for is_invariant in (False, True):
        out = torch.full((count, 3, 80), math.nan, dtype=dtype, device=DEVICE)
        head_product(x, weight, out[..., :72], is_invariant=is_invariant)
        assert_near(out[..., :72], expected, TOLERANCES[dtype])
        assert out[..., 72:].isnan().all()
