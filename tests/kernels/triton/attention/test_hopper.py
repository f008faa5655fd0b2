"""Hopper's prefill attention: what it takes, that it compiles anywhere, and, on a Hopper, its rows.

NaN lies in every slot that no token owns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, KVLayer
from tests.kernels.cases import (
    PagedKV,
    assert_close,
    attention_op,
    exact_attention,
    floats,
    make_paged,
    split_table,
)
from tests.kernels.triton.cases import there
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention import choose as tiles  # isort: skip
from octavo.kernels.triton.attention.hopper import kernel as hopper  # isort: skip
from octavo.kernels.triton.attention.hopper import pieces  # isort: skip
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention
from octavo.kernels.triton.attention.splits import tiling

on_hopper = pytest.mark.skipif(
    not hopper.has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU"
)


def _pages(block_size: int, head_size: int, dtype: torch.dtype) -> KVLayer:
    arena = torch.zeros(3, 2, block_size, 2, head_size, dtype=dtype)
    return KVLayer(key=arena[:, 0], value=arena[:, 1])


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"head_size": 64, "block_size": 128}, True),
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, True),
        ({"head_size": 80}, False),
        ({"head_size": 256}, False),
        ({"block_size": 8}, False),
        ({"block_size": 48}, False),
        ({"window": 1000}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, False),
        ({"dtype": torch.float16}, False),
    ],
)
def test_it_takes_what_it_can(
    change: dict[str, object], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = torch.bfloat16
    case = {"head_size": 128, "block_size": 16, "dtype": bf16, "kv_dtype": bf16, "window": None}
    case |= change
    q = torch.zeros(70, 4, case["head_size"], dtype=case["dtype"])
    layer = _pages(case["block_size"], case["head_size"], case["kv_dtype"])
    op = attention_op(4, layer, 0.1, case["window"])
    assert not hopper.fits(q, op, layer), "a CPU is no Hopper"
    monkeypatch.setattr(hopper, "has_wgmma", lambda device: True)
    assert hopper.fits(q, op, layer) == is_taken


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.attention.hopper.kernel import LONG, SHARED, SHORT, UNSPECIALISED
from octavo.kernels.triton.attention.hopper.kernel import _hopper_kernel, _ring

kernel = _hopper_kernel._function

page = f"tensordesc<bf16[1,16,64],{gl.NVMMASharedLayout(128, 16, 3)!r}>"
types = {"key": page, "value": page, "scale_log2": "fp32"}
types |= dict.fromkeys(("q", "out"), "*bf16")
types |= dict.fromkeys(("partial_out", "partial_lse"), "*fp32")
types |= dict.fromkeys(("starts", "lengths", "members", "query_starts", "sizes"), "*i32")
types |= {"piece_starts": "*i32", "sinks": "*fp32"}
types |= {"block_table": "*i32"} | dict.fromkeys(UNSPECIALISED, "i32")
constants = {"H": 8, "GROUP": 4, "STACK": 4, "D": 128, "MOST": 64}
constants |= {"OVERLAP": 1}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
for form, num_tokens in ((LONG, 4096), (SHORT, 4096), (SHORT, 64), (SHARED, 32)):
    block_n, stages = _ring(form, num_tokens, 16)
    values = constants | {"FORM": form.value, "BLOCK_N": block_n, "STAGES": stages}
    values["HAS_SINKS"] = form is not SHARED
    at = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(kernel, signature, at)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["ptx"].count("wgmma.mma_async") > 0
    assert built.metadata.shared <= 227 * 1024
"""


def test_it_compiles_for_hopper_without_one() -> None:
    compiler = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def _attend(q: Tensor, paged: PagedKV, batch: AttentionBatch) -> Tensor:
    layer, moved = there(paged, batch)
    op = attention_op(q.shape[1], layer, 0.1)
    assert hopper.fits(q.cuda(), op, layer)
    return tiles.attention(q.cuda(), op, layer, moved).float().cpu()


class _Pointer:
    """Numbers in memory, to a kernel's function that Python runs."""

    def __init__(self, values: list[int], at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, count: int) -> _Pointer:
        return _Pointer(self.values, self.at + count)


def _pieces(
    form: int, plan: tuple[object, ...], programs: int, heads: int, stack: int
) -> list[list[tuple[int, ...]]]:
    """Returns every program's pieces that have KV tiles."""
    found = []
    for program in range(programs):
        device = SimpleNamespace(
            num_programs=lambda axis: programs,
            program_id=lambda axis, program=program: program,
            load=lambda at, mask=True, other=0: _Number(at.values[at.at] if mask else other),
            maximum=max,
            minimum=min,
            cdiv=lambda a, b: -(-a // b),
            int64=int,
        )
        names = {"gl": device, "LONG": 0, "SHORT": 1, "SHARED": 2}
        names["find"] = FunctionType(pieces.find.fn.__code__, names)
        piece = FunctionType(pieces.piece.fn.__code__, names)
        turns = range(-(-plan[8] // programs))
        done = [piece(_Number(turn), plan, 128, heads, stack, form, 64, 128) for turn in turns]
        found.append([one for one in done if one[7] > 0])
    return found


class _Number(int):
    """An integer as kernels have them."""

    def to(self, kind: type) -> int:
        return kind(self)

    def __add__(self, other: int) -> _Number:
        return _Number(int(self) + other)

    def __mul__(self, other: int) -> _Number:
        return _Number(int(self) * other)


QUERY_LENS = [1, 64, 65, 2, 0, 300, 64, 64, 129, 17, 1, 64, 64, 64, 5, 30]
LENGTHS = [9, 64, 2000, 5000, 0, 300, 1025, 16384, 4000, 1024, 7, 40000, 64, 70, 40, 0]
"""The last one is padding: queries of a captured graph that stand for nobody."""


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("size", [512, 2560, 40064])
def test_pieces_of_chunks_cover_every_row_and_key_once(
    stack: int, programs: int, size: int
) -> None:
    starts = np.cumsum([0, *QUERY_LENS]).tolist()
    owners, queries, groups = len(QUERY_LENS), 128 // stack, 8 // stack
    tiles = -(-starts[-1] // queries) + owners - 1
    table = split_table(QUERY_LENS, LENGTHS, size, queries)
    common = (
        _Pointer(starts),
        _Pointer(LENGTHS),
        None,
        None,
        *[_Pointer(table)] * 2,
        owners,
        tiles,
    )
    done: dict[tuple[int, int, int], int] = {}
    partials: set[int] = set()
    for form, count in ((0, groups * tiles), (1, groups * table[owners])):
        by_program = _pieces(form, (*common, count), programs, 8, stack)
        for heads, split, s, row, count, first, tile, tiles, length, parts, base in (
            one for mine in by_program for one in mine
        ):
            assert (row, count, length) == (starts[s], QUERY_LENS[s], LENGTHS[s])
            assert parts == (-(-length // size) if form == 1 else 1)
            for i in range(first, min(first + queries, count)):
                position = length - count + i
                for n in range(tile, min(tile + tiles, position // 128 + 1)):
                    done[row + i, heads, n] = done.get((row + i, heads, n), 0) + 1
                if parts > 1:
                    place = (base + i * parts + split) * groups + heads
                    assert place not in partials, "two partial results in one place"
                    partials.add(place)
        if form == 1:
            numbers = [len(mine) for mine in by_program]
            assert max(numbers) <= -(-sum(numbers) // programs) + 1, "some have more turns"
    assert max(partials, default=-1) < table[2 * owners + 1] * groups
    expected = {
        (starts[s] + i, heads, n)
        for s, count in enumerate(QUERY_LENS)
        for i in range(count if count > 1 else 0)
        for heads in range(groups)
        for n in range((LENGTHS[s] - count + i) // 128 + 1)
    }
    assert set(done) == expected
    assert set(done.values()) == {1}


@pytest.mark.parametrize("programs", [3, 132])
def test_pieces_of_shared_prefixes_cover_every_member_and_key_once(programs: int) -> None:
    lengths = [1700] * 40 + [4300] * 21 + [2000, 2100]
    table = np.arange(63 * 300, dtype=np.int32).reshape(63, 300)
    table[:40, :100], table[40:61, :256] = table[0, :100], table[40, :256]
    tiles = tiling(8, 1, 132)
    plan = plan_shared_prefix(table, np.array(lengths), np.ones(63, int), tiles)
    assert plan is not None
    for one in (plan, plan.padded(96)):
        members, starts, shared, _, sizes, piece_starts = (part.tolist() for part in one.arrays)
        pointers = [_Pointer(part) for part in (starts, shared, members)]
        work = (*pointers, None, _Pointer(sizes), _Pointer(piece_starts), len(sizes), 0)
        by_program = _pieces(2, (*work, piece_starts[-1]), programs, 8, 8)
        done = [
            (members[row + i], n)
            for mine in by_program
            for heads, _, s, row, count, first, tile, tiles, length, _, _ in mine
            for i in range(first, min(first + 16, count))
            for n in range(tile, tile + tiles)
            if (heads, s, length) == (0, members[row], shared[members[row]])
        ]
        assert sorted(done) == [(s, n) for s in range(61) for n in range(-(-shared[s] // 128))]
        assert sum(len(mine) for mine in by_program) == piece_starts[-1], "some are empty"


@on_hopper
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 128), (8, 2, 64), (8, 1, 128)])
def test_rows_are_right_and_those_of_long_chunks_have_their_own_bits(
    rng: np.random.Generator, heads: int, kv_heads: int, size: int, block_size: int
) -> None:
    lengths = [65, 1, 128, 127, 129, 1000, 64, 2500, 1030, 3000, 1025, 40]
    query_lens = [65, 1, 128, 70, 129, 1000, 64, 333, 66, 64, 9, 2]
    paged = make_paged(rng, lengths, (kv_heads, size), dtype=torch.bfloat16, block_size=block_size)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), heads, size).bfloat16()
    found = _attend(q, paged, batch)
    assert_close(
        found,
        exact_attention(q, paged, batch, attention_op(heads, paged.layer, 0.1)),
        tolerance=2e-2,
    )
    for s, (length, count) in enumerate(zip(lengths, query_lens, strict=True)):
        end = sum(query_lens[: s + 1])
        for last in {count, max(65, count // 2), 65} if count > 64 else {count}:
            alone = PagedKV(
                layer=paged.layer,
                keys=paged.keys[s : s + 1],
                values=paged.values[s : s + 1],
                table=paged.table[s : s + 1],
                block_size=block_size,
            )
            rows = slice(end - last, end)
            again = _attend(q[rows], alone, alone.batch([length], [last]))
            what = f"{last} of {count} queries, length {length}"
            if 1 < count <= 64:  # Their splits depend on who else is there.
                assert_close(again, found[rows].double(), tolerance=2e-2)
            else:
                assert torch.equal(again, found[rows]), what


@on_hopper
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 128), (8, 2, 64), (8, 1, 128)])
def test_shared_prefixes_are_right(
    rng: np.random.Generator, heads: int, kv_heads: int, size: int
) -> None:
    lengths = [1700] * 20 + [2100, 2064, 2048, 500, 77, 1040]
    query_lens = [1] * 25 + [100]
    paged = make_paged(rng, lengths, (kv_heads, size), dtype=torch.bfloat16)
    for leader, members, blocks in ((0, range(1, 20), 100), (20, range(21, 23), 128)):
        for s in members:
            paged.table[s, :blocks] = paged.table[leader, :blocks]
            paged.keys[s][: 16 * blocks] = paged.keys[leader][: 16 * blocks]
            paged.values[s][: 16 * blocks] = paged.values[leader][: 16 * blocks]
    batch = paged.batch(lengths, query_lens)
    plan = plan_shared_prefix(
        paged.table.numpy(), np.array(lengths), np.array(query_lens), tiling(heads, kv_heads, 132)
    )
    assert plan is not None
    q = floats(rng, sum(query_lens), heads, size).bfloat16()
    layer, moved = there(paged, batch)
    device = torch.device("cuda")
    op = attention_op(heads, paged.layer, 0.1)
    found = shared_prefix_attention(q.cuda(), op, layer, moved, plan.to_device(device))
    expected = exact_attention(q, paged, batch, op)
    assert_close(found.float().cpu(), expected, tolerance=2e-2)
