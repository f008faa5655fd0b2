"""Paged latent vectors for the tests of latent attention, everything unused poisoned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.formats import KV_FORMATS, WEIGHT_FORMATS
from octavo.kernels.inputs import AttentionBatch, KVLayer, LatentOp, RopeTable
from octavo.kernels.kv_pages import write_vectors
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.kv_cache.spec import group_layers, latent_kv
from octavo.kv_cache.storage import KVStorage
from tests.kernels.cases import floats

P = 16


@dataclass(kw_only=True)
class PagedLatents:
    """Sequences in a scattered arena of two layers; everything that no token owns is NaN."""

    pages_BPC: Tensor
    tokens: list[Tensor]
    table: Tensor

    def batch(self, seq_lens: Sequence[int], query_lens: Sequence[int]) -> AttentionBatch:
        spans, device = list(zip(seq_lens, query_lens, strict=True)), self.pages_BPC.device
        positions = [torch.arange(n - q, n) for n, q in spans]
        slots = [self.table[s, p // P].long() * P + p % P for s, p in enumerate(positions)]
        return AttentionBatch(
            positions_T=torch.cat(positions).to(device, torch.int32),
            slot_mapping_T=torch.cat(slots).to(device),
            query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
            seq_lens_S=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=self.table.to(device),
        )


def make_latents(
    rng: np.random.Generator,
    lengths: Sequence[int],
    columns: int,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    device: str = "cpu",
) -> PagedLatents:
    """Returns sequences of `lengths`; the first `shared` tokens of all lie in the same blocks."""
    assert shared % P == 0
    own = [-(-n // P) - shared // P for n in lengths]
    num_blocks = sum(own) + shared // P + 3
    arena = torch.full((num_blocks, 2, P, columns), math.nan, dtype=dtype, device=device)
    pages = arena[:, 1]
    free = rng.permutation(num_blocks).astype(np.int32)
    common, free = free[: shared // P], free[shared // P :]
    table = np.full((len(lengths), max(own) + shared // P + 2), 2**30, np.int32)
    prefix = floats(rng, shared, columns).to(dtype)
    tokens = []
    for s, (length, count) in enumerate(zip(lengths, own, strict=True)):
        blocks, free = np.concatenate((common, free[:count])), free[count:]
        table[s, : len(blocks)] = blocks
        rows = torch.cat((prefix, floats(rng, length - shared, columns).to(dtype)))
        at = np.arange(length)
        pages[torch.from_numpy(blocks[at // P]).long(), torch.from_numpy(at % P)] = rows.to(device)
        tokens.append(rows)
    return PagedLatents(pages_BPC=pages, tokens=tokens, table=torch.from_numpy(table))


def exact(
    q: Tensor, latents: PagedLatents, batch: AttentionBatch, scale: float, rank: int
) -> Tensor:
    """Returns [T, H, rank] in float64."""
    parts = []
    for s, tokens in enumerate(latents.tokens):
        rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
        seen = tokens[: int(batch.seq_lens_S[s])].double()
        scores = torch.einsum("qhc,kc->hqk", q[rows].double().cpu(), seen) * scale
        hidden = torch.arange(len(seen)) > batch.positions_T[rows].cpu().unsqueeze(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,kr->qhr", weights, seen[:, :rank]))
    return torch.cat(parts)


def latent_layer(num_blocks: int, rank: int, rope_size: int, format: str) -> KVLayer:
    """Returns poisoned pages of a layer that keeps latent vectors in a format."""
    spec = latent_kv(rank, rope_size, KV_FORMATS[format])
    storage = KVStorage(group_layers((spec, spec)), num_blocks, P)
    storage.arena.fill_(0xFF)
    return KVLayer((rank, rope_size), **storage.layer(1).planes)


def write_tokens(layer: KVLayer, latents: PagedLatents) -> None:
    """Writes what the sequences keep in the layer's format."""
    for s, tokens in enumerate(latents.tokens):
        at = torch.arange(len(tokens))
        write_vectors(layer, "latent", latents.table[s, at // P].long() * P + at % P, tokens)


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
