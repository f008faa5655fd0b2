"""Latent attention of every back end against float64: what is kept, and what is attended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from octavo.kernels.inputs import KVLayer
from octavo.kernels.ops import Ops
from tests.kernels.cases import assert_close, floats
from tests.kernels.latent_cases import (
    HEADS,
    NOPE,
    RANK,
    ROPE,
    expected_of,
    make_latents,
    make_op,
)


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
