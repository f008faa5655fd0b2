"""Latent attention of Triton's back end over vectors in formats with scales, against the
specification over the same.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.inputs import KVLayer, LatentOp, RopeTable
from octavo.kernels.ops import Ops
from octavo.kernels.reference import ReferenceOps
from octavo.kernels.weights import Weight
from tests.kernels.cases import floats
from tests.kernels.latent_cases import P, latent_layer, make_latents, write_tokens
from tests.kernels.triton.cases import assert_near, make_ops
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.facts import split_partials  # isort: skip
from octavo.kernels.triton.attention.partials import make_partials  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix  # isort: skip
from octavo.kernels.triton.attention.splits import Tiling  # isort: skip
from octavo.kernels.triton.latent import choose, expand  # isort: skip
from octavo.kernels.triton.latent.decode import latent_decode  # isort: skip
from octavo.kernels.triton.latent.pages import latent_plane  # isort: skip
from octavo.kernels.triton.latent.shared import shared_latents  # isort: skip

HEADS, RANK, NOPE, ROPE, VALUE = 2, 64, 16, 64, 16


def make_op(parts: dict[str, torch.Tensor], ops: Ops, device: str) -> LatentOp:
    data = parts["kv_b"].to(device)
    kv_b = Weight(data=data, format=WEIGHT_FORMATS["f32"], rows=len(data), cols=RANK)
    angles = parts["angles"].to(device)
    return LatentOp(
        num_heads=HEADS,
        rank=RANK,
        nope_size=NOPE,
        rope_size=ROPE,
        value_size=VALUE,
        scale=0.1,
        rope=RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=ROPE),
        norm_R=parts["norm"].to(device),
        norm_eps=1e-6,
        weights=ops.prepare_latent(kv_b, HEADS, NOPE),
    )


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("absorbed", "int8"),
        ("absorbed", "int4"),
        ("deterministic", "fp8"),
        ("expanded", "int4"),
        ("expanded in ranges", "fp8"),
    ],
)
def test_a_step_is_as_specified(
    rng: np.random.Generator, form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form.startswith("expanded"):
        monkeypatch.setattr(choose, "MAX_PADDED_TOKENS", 4)
        monkeypatch.setattr(choose, "SHORT_QUERIES", 8)
    if form == "expanded in ranges":
        monkeypatch.setattr(expand, "EXPANDED_TOKENS", 1)
    lengths, query_lens = ([33, 20], [1, 2]) if form == "deterministic" else ([33, 140], [1, 12])
    paged = make_latents(rng, lengths, RANK + ROPE)
    layer = latent_layer(len(paged.pages_BPC), RANK, ROPE, name)
    write_tokens(layer, paged)
    there = KVLayer(**{plane: x.to(DEVICE, copy=True) for plane, x in layer.planes.items()})
    batch = paged.batch(lengths, query_lens)
    paged.pages_BPC = paged.pages_BPC.to(DEVICE)
    moved = paged.batch(lengths, query_lens)
    parts = {
        "kv_b": floats(rng, HEADS * (NOPE + VALUE), RANK) / math.sqrt(RANK),
        "angles": floats(rng, 256, ROPE // 2),
        "norm": floats(rng, RANK),
    }
    wide = floats(rng, sum(query_lens), HEADS * (NOPE + ROPE) + RANK + ROPE)
    sizes = [HEADS * (NOPE + ROPE), RANK + ROPE]
    ops, reference = make_ops(is_deterministic=form == "deterministic"), ReferenceOps(1)
    op = make_op(parts, reference, "cpu")
    expected = reference.latent_attention(*wide.split(sizes, dim=1), op, layer, batch)
    op = make_op(parts, ops, DEVICE)
    found = ops.latent_attention(*wide.to(DEVICE).split(sizes, dim=1), op, there, moved)
    # A number on the edge of two may be rounded the other way: one of thousands.
    assert_near(found, expected, 5e-4 if name == "int8" else 5e-3)
    at = batch.slot_mapping_T // P, batch.slot_mapping_T % P
    for plane, wanted in layer.planes.items():
        written = there.planes[plane].cpu()[at].view(torch.uint8)
        assert (written == wanted[at].view(torch.uint8)).float().mean() > 0.99, plane


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_shared_prefix_is_what_each_sees_alone(rng: np.random.Generator, name: str) -> None:
    lengths = [150, 140]
    paged = make_latents(rng, lengths, RANK + ROPE, shared=128)
    layer = latent_layer(len(paged.pages_BPC), RANK, ROPE, name)
    write_tokens(layer, paged)
    there = KVLayer(**{plane: x.to(DEVICE, copy=True) for plane, x in layer.planes.items()})
    paged.pages_BPC = paged.pages_BPC.to(DEVICE)
    batch, plane = paged.batch(lengths, [1, 1]), latent_plane(there, RANK, ROPE)
    plan = plan_shared_prefix(
        paged.table.numpy(),
        np.array(lengths, np.int32),
        np.ones(2, np.int32),
        Tiling(HEADS, HEADS, 132),
        min_blocks=4,
    )
    assert plan is not None
    prefix = plan.to_device(torch.device(DEVICE))
    q = floats(rng, 2, HEADS, RANK + ROPE).to(DEVICE)
    found, alone = (torch.full((2, HEADS, RANK), math.nan, device=DEVICE) for _ in range(2))
    partials = make_partials(found, prefix.max_splits + split_partials(prefix.max_tail))
    shared_latents(q, plane, batch, 0.2, prefix, partials)
    latent_decode(
        *(q, plane, batch, 0.2, found),
        max_seq_len=prefix.max_tail,
        shared=(prefix.shared_tokens_S, prefix.shared_partials_S),
        partials=partials,
    )
    latent_decode(q, plane, batch, 0.2, alone, max_seq_len=150)
    assert_near(found, alone, 2e-6)


def test_odd_rotated_columns_are_refused() -> None:
    layer = latent_layer(2, 64, 24, "int8")
    with pytest.raises(ValueError, match="power of two rotated columns, not 24"):
        latent_plane(layer, 64, 24)
