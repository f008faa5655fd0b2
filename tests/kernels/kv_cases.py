"""Paged KV in any format, in the layout of the storage, everything that no token owns poisoned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo.formats import kv_formats
from octavo.kernels.inputs import AttentionOp, KVLayer
from octavo.kernels.kv_pages import mixed_as, read_vectors, write_vectors
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.visibility import Full, Visibility
from tests.kernels.cases import PagedKV, floats

BLOCK = 16
PAIRS = ["fp8", "int8", "int4", "int8/int4", "float32/int8", "int4/bfloat16", "bfloat16/fp8"]


def make_stored(
    rng: np.random.Generator,
    lengths: Sequence[int],
    heads_and_size: tuple[int, int],
    formats: str,
    *,
    is_written: bool = True,
) -> PagedKV:
    """Returns sequences of `lengths` in shuffled pages, and the keys and values that the pages
    mean; pages that nobody has written yet unless `is_written`."""
    kv = kv_formats(formats)
    spec = attention_kv(*heads_and_size, kv.key, value_format=kv.value)
    counts = [-(-n // BLOCK) for n in lengths]
    storage = KVStorage(group_layers((spec, spec)), sum(counts) + 3, BLOCK)
    storage.arena.fill_(0xFF)
    layer = storage.layer(1)
    free = torch.from_numpy(rng.permutation(sum(counts) + 3)).to(torch.int32)
    table = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
    for s, count in enumerate(counts):
        table[s, :count], free = free[:count], free[count:]
    paged = PagedKV(layer=layer, keys=[], values=[], table=table, block_size=BLOCK)
    if is_written:
        for s, length in enumerate(lengths):
            slots = slots_of(paged, s, length)
            for name in ("key", "value"):
                # Tokens of all sizes: a scale is a token's own.
                sizes = torch.exp(floats(rng, length, heads_and_size[0], 1))
                x = floats(rng, length, *heads_and_size) * (sizes if name == "value" else 1)
                write_vectors(layer, name, slots, x)
        paged.keys[:] = [stored(paged, "key", s, n) for s, n in enumerate(lengths)]
        paged.values[:] = [stored(paged, "value", s, n) for s, n in enumerate(lengths)]
    return paged


def slots_of(paged: PagedKV, sequence: int, length: int) -> Tensor:
    at = torch.arange(length)
    return paged.table[sequence, at // BLOCK].long() * BLOCK + at % BLOCK


def stored(
    paged: PagedKV, name: str, sequence: int, length: int, *, is_balanced: bool = False
) -> Tensor:
    """Returns [length, K, D]: what the pages mean."""
    blocks = paged.table[sequence, : -(-length // BLOCK)].long()
    vectors = read_vectors(paged.layer, name, blocks).flatten(0, 1)[:length]
    return mixed_as(paged.layer, name, vectors, is_balanced=is_balanced)


def kv_op(
    num_heads: int,
    heads_and_size: tuple[int, int],
    *,
    visibility: Visibility = Full(),
    sinks_H: Tensor | None = None,
    soft_cap: float | None = None,
) -> AttentionOp:
    num_kv_heads, head_size = heads_and_size
    return AttentionOp(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        visibility=visibility,
        rope=None,
        qk_norm=None,
        sinks_H=sinks_H,
        soft_cap=soft_cap,
    )


def raw(layer: KVLayer) -> dict[str, Tensor]:
    """Returns the bytes of all planes."""
    return {name: plane.view(torch.uint8) for name, plane in layer.planes.items()}
