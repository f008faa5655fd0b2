"""Latent attention on Hopper: what it takes, that it compiles, and on a GPU what it says."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import KVLayer
from octavo.visibility import Full
from tests.kernels.cases import floats
from tests.kernels.latent_cases import PagedLatents, exact, make_latents
from tests.kernels.triton.cases import TOLERANCES, assert_near
from tests.kernels.triton.gluon_values import Machine
from tests.kernels.triton.interpreter import DEVICE

from tests.kernels.triton.gluon_cpu import Emulator, emulated  # isort: skip
from octavo.kernels.facts import split_partials  # isort: skip
from octavo.kernels.triton.attention.hopper.pieces import SHARED, SHORT  # isort: skip
from octavo.kernels.triton.attention.partials import make_partials  # isort: skip
from octavo.kernels.triton.attention.scores import plain_scores  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix  # isort: skip
from octavo.kernels.triton.attention.short_chunks import (  # isort: skip
    Limits,
    merge_short_chunks,
    plan_short_chunks,
)
from octavo.kernels.triton.attention.splits import latent_tiling  # isort: skip
from octavo.kernels.triton.latent.decode import latent_decode  # isort: skip
from octavo.kernels.triton.latent.hopper import chunks, tiles  # isort: skip
from octavo.kernels.triton.latent.hopper.chunks import short_latents  # isort: skip
from octavo.kernels.triton.latent.pages import LatentPlane, latent_plane  # isort: skip
from octavo.kernels.triton.latent.shared import shared_latents  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.launching.tickets import make_tickets  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
BF16 = torch.bfloat16
RANK, ROPE = 512, 64


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"rank": 256}, True),
        ({"rank": 192}, False),
        ({"rope": 32}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, False),
    ],
)
def test_it_takes_what_it_can(
    change: dict[str, object], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"rank": RANK, "rope": ROPE, "dtype": BF16} | change
    columns = case["rank"] + case["rope"]
    layer = KVLayer(latent=torch.zeros(3, 16, columns, dtype=BF16))
    plane = latent_plane(layer, case["rank"], case["rope"])
    q = torch.zeros(2, 16, columns, dtype=case["dtype"])
    assert not tiles.fits(q, plane), "a CPU is no Hopper"
    monkeypatch.setattr(tiles, "has_wgmma", lambda device: True)
    assert tiles.fits(q, plane) == is_taken


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.attention.hopper.pieces import SHARED, SHORT
from octavo.kernels.triton.latent.hopper import chunks, few_heads, lone, tiles

types = {"pages": f"tensordesc<bf16[1,16,64],{gl.NVMMASharedLayout(128, 16, 3)!r}>"}
types |= {"scale_log2": "fp32"} | dict.fromkeys(("q", "out"), "*bf16")
types |= dict.fromkeys(("partial_out", "partial_lse"), "*fp32")
types |= dict.fromkeys(("starts", "lengths", "members", "query_starts", "sizes"), "*i32")
types |= dict.fromkeys(("piece_starts", "block_table", "seq_lens", "tickets"), "*i32")
types |= dict.fromkeys(("shared_tokens", "shared_partials"), "*i32")
types |= dict.fromkeys(chunks.UNSPECIALISED + few_heads.UNSPECIALISED, "i32")


def build(kernel, options={"num_warps": 8}, **values):
    values |= {"H": 16, "RANK": 512, "BLOCK_N": tiles.TILE, "OVERLAP": 1}
    kernel = kernel._function
    if "REGISTERS" in kernel.arg_names:
        values |= {"REGISTERS": tiles.PRODUCER_REGISTERS}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    at = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(kernel, signature, at)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["ptx"].count("wgmma.mma_async") > 0
    assert built.metadata.shared <= 227 * 1024


many = {"STACK": 16, "PRODUCER": tiles.PRODUCER_REGISTERS}
many |= {"CONSUMER": chunks.CONSUMER_REGISTERS}
build(chunks._latent_pieces_kernel, {"num_warps": 4}, FORM=SHORT.value, **many)
build(chunks._latent_pieces_kernel, {"num_warps": 4}, FORM=SHARED.value, **many)
build(lone._lone_latents_kernel, GROUP=16, HEADS=2, HAS_SHARED=True)
build(lone._lone_latents_kernel, GROUP=16, HEADS=1, HAS_SHARED=False)
few = {"M": few_heads.MOST_HEADS, "HEADS": 2, "HAS_SHARED": True}
few |= {"PRODUCER": tiles.PRODUCER_REGISTERS, "CONSUMER": few_heads.CONSUMER_REGISTERS}
build(few_heads._few_heads_kernel, {"num_warps": 4, "maxnreg": few_heads.REGISTERS}, **few)
"""


def test_it_compiles_for_hopper_without_one() -> None:
    compiler = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(DEVICE != "cpu", reason="plans and merges by Triton's interpreter")
@pytest.mark.parametrize(
    ("form", "is_late", "gain"),
    [(SHORT.value, True, 30.0), (SHARED.value, False, 30.0), (SHORT.value, False, 1.0)],
)
def test_pieces_of_many_rows_without_a_gpu(
    rng: np.random.Generator, form: int, is_late: bool, gain: float
) -> None:
    """With scores that leave float16 no room from the first tile's on, and without."""
    rank, heads, dtype = 128, 16, torch.float16
    is_shared = form == SHARED.value
    lengths, shared = ([201, 230, 200, 222, 240], 192) if is_shared else ([150, 34, 129], 0)
    query_lens = [1] * 5 if is_shared else [3, 2, 7]
    total, kernels = sum(query_lens), emulated(chunks.__name__, is_late=is_late)
    latents = make_latents(rng, lengths, rank + ROPE, dtype, shared=shared)
    plane = latent_plane(KVLayer(latent=latents.pages_BPC), rank, ROPE)
    q = (gain * floats(rng, total, heads, rank + ROPE)).to(dtype)
    out = torch.full((total, heads, rank), math.nan, dtype=dtype)
    batch, tiling = latents.batch(lengths, query_lens), latent_tiling(heads, 3)
    if is_shared:
        lens, ones = np.array(lengths, np.int32), np.ones(len(lengths), np.int32)
        found = plan_shared_prefix(latents.table.numpy(), lens, ones, tiling, min_blocks=4)
        assert found is not None
        prefix = found.to_device(torch.device("cpu"))
        most = prefix.max_splits + split_partials(prefix.max_tail)
        partials = make_partials(out, most)
        kernels.shared_prefixes(q, plane, batch, 0.1, prefix, partials, tiling)
        shared_of = prefix.shared_tokens_S, prefix.shared_partials_S
        latent_decode(
            *(q, plane, batch, 0.1, out),
            max_seq_len=prefix.max_tail,
            shared=shared_of,
            partials=partials,
        )
    else:
        limits = Limits(queries=64, splits=2, shortest=128, partials=total * 2)
        plan = plan_short_chunks(batch, tiling, Full(), limits)
        partials = make_partials(out, 2)
        kernels.short_latents(q, plane, batch, 0.1, out, partials, plan, total, tiling)
        merge_short_chunks(out, plain_scores(0.1, plan.table), batch, plan, partials, total)
    assert_near(out, exact(q, latents, batch, 0.1, rank), TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("module", "name", "is_late"),
    [("lone", "lone_latents", True), ("few_heads", "few_head_latents", False)],
)
def test_single_queries_without_a_gpu(
    rng: np.random.Generator, module: str, name: str, is_late: bool
) -> None:
    """A program a row, as programs of a row would wait for each other."""
    rank, heads, dtype, lengths = 128, 9, torch.float16, [1, 64, 150, 65]
    latents = make_latents(rng, lengths, rank + ROPE, dtype)
    plane = latent_plane(KVLayer(latent=latents.pages_BPC), rank, ROPE)
    q = floats(rng, len(lengths), heads, rank + ROPE).to(dtype)
    out = torch.full((len(lengths), heads, rank), math.nan, dtype=dtype)
    batch = latents.batch(lengths, [1] * len(lengths))
    emulator = Emulator(Machine(is_late=is_late))
    folder = "octavo.kernels.triton.latent.hopper."
    rows = emulator.load(folder + "rows").LoneRows(
        q_THC=q,
        plane=plane,
        batch=batch,
        scale=0.1,
        out_THR=out,
        partials=make_partials(out, 1),
        tickets=make_tickets(torch.device("cpu")),
        shared=None,
        most_shares=1,
    )
    getattr(emulator.load(folder + module), name)(rows)
    assert_near(out, exact(q, latents, batch, 0.1, rank), TOLERANCES[dtype])


def _case(
    rng: np.random.Generator, lengths: list[int], num_queries: int, heads: int, shared: int = 0
) -> tuple[PagedLatents, LatentPlane, Tensor, Tensor]:
    latents = make_latents(rng, lengths, RANK + ROPE, BF16, shared=shared, device=DEVICE)
    plane = latent_plane(KVLayer(latent=latents.pages_BPC), RANK, ROPE)
    q = floats(rng, num_queries, heads, RANK + ROPE).to(DEVICE, BF16)
    assert tiles.fits(q, plane)
    out = torch.full((num_queries, heads, RANK), math.nan, dtype=BF16, device=DEVICE)
    return latents, plane, q, out


@on_hopper
@pytest.mark.parametrize("heads", [8, 16, 20, 128])
@pytest.mark.parametrize(
    "lengths", [[1, 15, 64, 65, 1023, 4097, 2600, 20000], [33], [0, 40000], [700] * 150]
)
def test_single_queries(rng: np.random.Generator, heads: int, lengths: list[int]) -> None:
    latents, plane, q, out = _case(rng, lengths, len(lengths), heads)
    batch, tickets = latents.batch(lengths, [1] * len(lengths)), make_tickets(torch.device(DEVICE))
    seen = [n > 0 for n in lengths]
    for _ in range(3):
        latent_decode(q, plane, batch, 0.1, out, max_seq_len=max(lengths), tickets=tickets)
        expected = exact(q, latents, batch, 0.1, RANK)
        assert_near(out[seen], expected[seen], TOLERANCES[BF16])
        assert not out[[not one for one in seen]].any()
        assert not tickets.any()


@on_hopper
@pytest.mark.parametrize("heads", [8, 16, 20, 128])
def test_short_chunks(rng: np.random.Generator, heads: int) -> None:
    lengths, query_lens = [40, 300, 17, 5000, 64, 129, 16384], [2, 9, 17, 64, 64, 5, 33]
    total = sum(query_lens)
    latents, plane, q, out = _case(rng, lengths, total, heads)
    batch, tiling = latents.batch(lengths, query_lens), latent_tiling(heads, 132)
    limits = Limits(queries=64, splits=16, shortest=256, partials=total * 16)
    plan = plan_short_chunks(batch, tiling, Full(), limits)
    partials = make_partials(out, 16)
    short_latents(q, plane, batch, 0.1, out, partials, plan, total, tiling)
    merge_short_chunks(out, plain_scores(0.1, plan.table), batch, plan, partials, total)
    assert_near(out, exact(q, latents, batch, 0.1, RANK), TOLERANCES[BF16])


@on_hopper
@pytest.mark.parametrize("heads", [8, 16, 128])
@pytest.mark.parametrize(
    ("lengths", "shared"), [([2100] * 3, 2080), ([4133, 4100, 5000] * 9, 4096)]
)
def test_shared_prefixes(
    rng: np.random.Generator, heads: int, lengths: list[int], shared: int
) -> None:
    latents, plane, q, out = _case(rng, lengths, len(lengths), heads, shared)
    batch, ones = latents.batch(lengths, [1] * len(lengths)), np.ones(len(lengths), np.int32)
    plan = plan_shared_prefix(
        latents.table.numpy(), np.array(lengths, np.int32), ones, latent_tiling(heads, 132)
    )
    assert plan is not None
    prefix = plan.to_device(torch.device(DEVICE))
    partials = make_partials(out, prefix.max_splits + split_partials(prefix.max_tail))
    shared_latents(q, plane, batch, 0.1, prefix, partials)
    latent_decode(
        *(q, plane, batch, 0.1, out),
        max_seq_len=prefix.max_tail,
        shared=(prefix.shared_tokens_S, prefix.shared_partials_S),
        partials=partials,
    )
    assert_near(out, exact(q, latents, batch, 0.1, RANK), TOLERANCES[BF16])
