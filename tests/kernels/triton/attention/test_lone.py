"""Single queries over compressed keys and values: what the kernel takes, that it compiles for
Hopper without one, and on a GPU what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.kv_pages import mixed_as, write_vectors
from octavo.visibility import Full, Visibility, Window
from tests.kernels.cases import PagedKV, exact_attention, floats
from tests.kernels.kv_cases import kv_op, make_stored, slots_of, stored
from tests.kernels.triton.cases import TOLERANCES, assert_near, on_device
from tests.kernels.triton.gluon_values import Machine, whole
from tests.kernels.triton.interpreter import DEVICE

from tests.kernels.triton.gluon_cpu import Emulator, emulated  # isort: skip
from octavo.kernels.triton.attention.choose import attention  # isort: skip
from octavo.kernels.triton.attention.device_plan import DevicePlan  # isort: skip
from octavo.kernels.triton.attention.hopper import lone  # isort: skip
from octavo.kernels.triton.attention.partials import make_partials  # isort: skip
from octavo.kernels.triton.attention.shared import (  # isort: skip
    plan_shared_prefix,
    shared_prefix_attention,
)
from octavo.kernels.triton.attention.single_rows import SingleRows  # isort: skip
from octavo.kernels.triton.attention.splits import tiling  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.launching.tickets import make_tickets  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "size", "heads", "visibility", "soft_cap", "is_taken"),
    [
        ("int8", 64, 8, None, None, True),
        ("int4", 256, 8, None, None, True),
        ("int8/int4", 128, 32, None, None, True),
        ("int8", 192, 8, None, None, False),
        ("int8", 64, 64, None, None, False),
        ("int8", 64, 8, Window(40), None, False),
        ("fp8", 64, 8, None, 30.0, False),
    ],
)
def test_it_takes_what_it_can(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: int,
    heads: int,
    visibility: Visibility | None,
    soft_cap: float | None,
    is_taken: bool,
) -> None:
    layer = make_stored(rng, [3], (2, size), name).layer
    op = replace(kv_op(heads, (2, size)), visibility=visibility or Full(), soft_cap=soft_cap)
    q = torch.zeros(1, heads, size, dtype=BF16)
    assert not lone.fits(q, op, layer), "a CPU is no Hopper"
    monkeypatch.setattr(lone, "has_wgmma", lambda device: True)
    assert lone.fits(q, op, layer) == is_taken
    assert not lone.fits(q.float(), op, layer)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.attention.hopper import lone

kernel = lone._lone_rows_kernel._function
types = {"out": "*bf16", "q": "*bf16", "scale_log2": "fp32"}
types |= dict.fromkeys(("partial_out", "partial_lse"), "*fp32")
types |= dict.fromkeys(("key_scale", "value_scale"), "*bf16")
types |= dict.fromkeys(("query_starts", "seq_lens", "shared_tokens", "shared_partials"), "*i32")
types |= dict.fromkeys(("partial_starts", "tickets", "block_table"), "*i32")
types |= dict.fromkeys((n for n in kernel.arg_names if n.startswith("stride")), "i32")
types |= dict.fromkeys(lone.UNSPECIALISED, "i32")
numbers = {"int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}


def build(KEY, VALUE, D, HEADS, **values):
    values |= {"H": 2 * HEADS, "K": 2, "P": 16, "KEY": KEY, "VALUE": VALUE, "D": D, "HEADS": HEADS}
    kinds = types | {"key": numbers[KEY], "value": numbers[VALUE]}
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    at = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    options = {"num_warps": lone.WARPS, "maxnreg": lone.REGISTERS}
    source = GluonASTSource(kernel, signature, at)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["ptx"].count("mma.sync") > 0


build("int8", "int4", 64, 16, HAS_SHARED=False, PACKED=True, MERGED=1, UNMIX=True, OVERLAP=1)
build("int4", "fp8", 128, 8, HAS_SHARED=True, PACKED=False, MERGED=4, UNMIX=False, OVERLAP=1)
build("int4", "int4", 256, 8, HAS_SHARED=False, PACKED=False, MERGED=2, UNMIX=True, OVERLAP=1)
"""


def test_it_compiles_for_hopper_without_one() -> None:
    compiler = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


LONE = "octavo.kernels.triton.attention.hopper.lone"


@pytest.fixture
def emulated_lone(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = emulated(LONE, is_late=False)
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(module, "launch_options", lambda device: {"OVERLAP": True})
    return module


def emulated_attention(module: Any, paged: PagedKV, name: str, q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the kernel says of rows that one program sees, and what is right."""
    lengths = [len(one) for one in paged.keys]
    num_kv_heads, size = paged.keys[0].shape[1:]
    batch, op = paged.batch(lengths, [1] * len(q)), kv_op(q.shape[1], (num_kv_heads, size))
    mixed = mixed_as(paged.layer, "key", q.float()).to(BF16)
    out = torch.full_like(mixed, float("nan"))
    partials, tickets = make_partials(out, 2, None, None), torch.zeros(64, dtype=torch.int32)
    asked = SingleRows(
        q_THD=mixed, op=op, layer=paged.layer, batch=batch, out=out, partials=partials,
        most_partials=1, tickets=tickets,
    )  # fmt: skip
    module.lone_rows(asked, unmixes=name.endswith("int4"))
    return out, exact_attention(q, paged, batch, op).reshape(out.shape)


@pytest.mark.parametrize(
    ("name", "heads", "size"),
    [
        ("int4", (8, 2), 128),
        ("int4", (3, 1), 256),
        ("int8", (3, 3), 64),
        ("fp8", (10, 1), 128),
        ("int8/int4", (4, 2), 64),
        ("int4/fp8", (4, 1), 256),
    ],
)
def test_single_queries_without_a_gpu(
    rng: np.random.Generator, emulated_lone: Any, name: str, heads: tuple[int, int], size: int
) -> None:
    paged = make_stored(rng, [1, 70, 200], (heads[1], size), name)
    q = floats(rng, 3, heads[0], size).to(BF16)
    assert_near(*emulated_attention(emulated_lone, paged, name, q), 6e-3)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_share_begins_again_where_scores_outgrow_its_first_tiles(
    rng: np.random.Generator, emulated_lone: Any, name: str
) -> None:
    """A late key is so much nearer to its query that its weight, of the first ones, is no float."""
    paged = make_stored(rng, [200], (2, 64), name)
    q = (4 * floats(rng, 1, 2, 64)).to(BF16)
    write_vectors(paged.layer, "key", slots_of(paged, 0, 200)[150:151], 2 * q.float())
    paged.keys[0] = stored(paged, "key", 0, 200)
    scores = torch.einsum("hd,thd->th", q[0].double(), paged.keys[0].double()) / 8
    assert (scores.max(0).values - scores[:64].max(0).values).min() > 128
    assert_near(*emulated_attention(emulated_lone, paged, name, q), 6e-3)


@on_hopper
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int8/int4", "int4/fp8"])
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 64), ((32, 4), 128), ((16, 1), 256)])
@pytest.mark.parametrize("lengths", [[1, 15, 64, 65, 1023, 4097, 20000, 7], [700] * 150])
def test_single_queries(
    rng: np.random.Generator, name: str, heads: tuple[int, int], size: int, lengths: list[int]
) -> None:
    paged = make_stored(rng, lengths, (heads[1], size), name)
    asks = [int(n != 7) for n in lengths]  # one sequence has no query
    batch = paged.batch(lengths, asks)
    q = floats(rng, sum(asks), heads[0], size).to(BF16)
    op = kv_op(heads[0], (heads[1], size))
    layer, moved = on_device(paged.layer, batch)
    mixed = mixed_as(paged.layer, "key", q.float()).to(DEVICE, BF16)
    assert lone.fits(mixed, op, layer)
    tickets = make_tickets(torch.device(DEVICE))
    # What knows that there is nothing else has the sums of values in their own basis at once.
    for plan in (None, DevicePlan(max_query_len=1, num_short_tokens=0), None):
        found = attention(mixed, op, layer, replace(moved, plan=plan), tickets=tickets)
        assert_near(found, exact_attention(q, paged, batch, op), TOLERANCES[BF16])
        assert not tickets.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
def test_partial_results_of_tails_lie_where_those_of_the_prefix_do() -> None:
    """By sequence: a chunk of queries may stand before single ones."""
    emulator, per_token, num_heads, group = Emulator(Machine()), 5, 8, 2
    shares = emulator.load("octavo.kernels.triton.attention.hopper.shares")
    machine, starts = emulator.machine, torch.tensor([0, 3, 4, 5], dtype=torch.int32)
    tokens = [300, 280, 290], [0, 256, 256], [0, 1, 1]
    at = [machine.pointer(one) for one in (starts, *(torch.tensor(n).int() for n in tokens))]
    machine.grid = num_heads // group, 3, 1
    most = whole(per_token)
    for sequence, heads in product((1, 2), range(num_heads // group)):
        machine.program = heads, sequence, 0
        place, _ = shares.share_of(*at, group, True, 64)
        first, stride = shares.partials_of(place, at[0], most, num_heads, False)
        assert int(first) == (sequence * num_heads + heads * group) * per_token
        assert int(stride) == per_token


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
def test_tails_behind_a_shared_prefix_and_a_chunk_without_a_gpu(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, emulated_lone: Any
) -> None:
    monkeypatch.setattr(emulated_lone, "num_processors", lambda device: 1)
    monkeypatch.setattr(lone, "fits", lambda *_: True)
    monkeypatch.setattr(lone, "lone_rows", emulated_lone.lone_rows)
    lengths, query_lens = [40, 300, 300, 280], np.array([5, 1, 1, 1], np.int32)
    paged = make_stored(rng, lengths, (2, 64), "int8")
    batch = paged.batch(lengths, query_lens.tolist())
    for s in (2, 3):
        paged.table[s, :16] = paged.table[1, :16]
        paged.keys[s][:256], paged.values[s][:256] = paged.keys[1][:256], paged.values[1][:256]
    seq_lens = np.array(lengths, np.int32)
    tiles = tiling(4, 2, 132)
    plan = plan_shared_prefix(paged.table.numpy(), seq_lens, query_lens, tiles, min_blocks=8)
    assert plan is not None
    q, op = floats(rng, int(query_lens.sum()), 4, 64), kv_op(4, (2, 64))
    mixed = mixed_as(paged.layer, "key", q).to(BF16)
    shared = plan.to_device(torch.device(DEVICE))
    found = shared_prefix_attention(mixed, op, paged.layer, batch, shared)
    assert_near(found[-3:], exact_attention(q, paged, batch, op)[-3:], 2e-2)


@on_hopper
@pytest.mark.parametrize(("num_before", "is_alone"), [(1, False), (1, True), (7, False)])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_tails_behind_a_shared_prefix(
    rng: np.random.Generator, name: str, num_before: int, is_alone: bool
) -> None:
    """After one more of it, or a chunk that shares it with nobody."""
    lengths, query_lens = [2100] * 4, np.array([num_before, 1, 1, 1], np.int32)
    paged = make_stored(rng, lengths, (4, 128), name)
    batch = paged.batch(lengths, query_lens.tolist())
    for s in (1, 2, 3):
        paged.table[s, :128] = paged.table[0, :128]
        paged.keys[s][:2048], paged.values[s][:2048] = paged.keys[0][:2048], paged.values[0][:2048]
    seq_lens = np.full(4, 2100, np.int32)
    plan = plan_shared_prefix(paged.table.numpy(), seq_lens, query_lens, tiling(32, 4, 132))
    assert plan is not None
    q = floats(rng, int(query_lens.sum()), 32, 128).to(BF16)
    op = kv_op(32, (4, 128))
    layer, moved = on_device(paged.layer, batch)
    mixed = mixed_as(paged.layer, "key", q.float()).to(DEVICE, BF16)
    if is_alone:
        moved = replace(moved, plan=DevicePlan(max_query_len=1, num_short_tokens=0))
    found = shared_prefix_attention(mixed, op, layer, moved, plan.to_device(torch.device(DEVICE)))
    expected = exact_attention(q, paged, batch, op)
    assert_near(found[-3:], expected[-3:], TOLERANCES[BF16])
