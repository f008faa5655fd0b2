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

from octavo.kernels.ops import AttentionBatch, KVLayer
from tests.kernels.cases import PagedKV, assert_close, exact_attention, floats, make_paged
from tests.kernels.triton_interpreter import DEVICE

from octavo.kernels.triton import attention as tiles  # isort: skip
from octavo.kernels.triton import attention_hopper as hopper  # isort: skip
from octavo.kernels.triton import hopper_pieces as pieces  # isort: skip
from octavo.kernels.triton.shared_prefix import plan_shared_prefix, shared_prefix_attention

on_hopper = pytest.mark.skipif(
    not hopper._has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU"
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
    assert not hopper.fits(q, layer, case["window"]), "a CPU is no Hopper"
    monkeypatch.setattr(hopper, "_has_wgmma", lambda device: True)
    assert hopper.fits(q, layer, case["window"]) == is_taken


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.attention_hopper import UNSPECIALISED, _hopper_kernel

kernel = _hopper_kernel._function

page = f"tensordesc<bf16[1,16,64],{gl.NVMMASharedLayout(128, 16, 3)!r}>"
types = {"key": page, "value": page, "scale_log2": "fp32"}
types |= dict.fromkeys(("q", "out"), "*bf16")
types |= dict.fromkeys(("partial_out", "partial_lse"), "*fp32")
types |= dict.fromkeys(("starts", "lengths", "members", "query_starts", "sizes"), "*i32")
types |= {"block_table": "*i32"} | dict.fromkeys(UNSPECIALISED, "i32")
constants = {"H": 8, "GROUP": 4, "STACK": 4, "D": 128, "MOST": 64, "LEAST": 1024}
constants |= {"BLOCK_N": 128, "STAGES": 2, "OVERLAP": 1}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
for form in range(3):
    values = constants | {"FORM": form}
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


def _there(paged: PagedKV, batch: AttentionBatch) -> tuple[KVLayer, AttentionBatch]:
    arena = torch.stack((paged.layer.key, paged.layer.value), 1).cuda()
    there = AttentionBatch(
        positions_T=batch.positions_T.cuda(),
        slot_mapping_T=batch.slot_mapping_T.cuda(),
        query_starts=batch.query_starts.cuda(),
        seq_lens_S=batch.seq_lens_S.cuda(),
        block_table=batch.block_table.cuda(),
    )
    return KVLayer(key=arena[:, 0], value=arena[:, 1]), there


def _attend(q: Tensor, paged: PagedKV, batch: AttentionBatch) -> Tensor:
    layer, there = _there(paged, batch)
    assert hopper.fits(q.cuda(), layer, None)
    return tiles.attention(q.cuda(), layer, there, 0.1, None).float().cpu()


class _Pointer:
    """Numbers in memory, to a kernel's function that Python runs."""

    def __init__(self, values: list[int], at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, count: int) -> _Pointer:
        return _Pointer(self.values, self.at + count)


def _pieces(
    form: int, plan: tuple[object, ...], programs: int, heads: int, stack: int
) -> list[tuple[int, ...]]:
    """Returns every program's pieces that have KV tiles."""
    found = []
    for program in range(programs):
        device = SimpleNamespace(
            num_programs=lambda axis: programs,
            program_id=lambda axis, program=program: program,
            load=lambda at, mask=True, other=0: at.values[at.at] if mask else other,
            maximum=max,
            minimum=min,
            cdiv=lambda a, b: -(-a // b),
        )
        names = {"gl": device, "LONG": 0, "SHORT": 1, "SHARED": 2, "ROWS": 64}
        names["find"] = FunctionType(pieces.find.fn.__code__, names)
        piece = FunctionType(pieces.piece.fn.__code__, names)
        work = heads // stack * plan[6] * plan[7]
        for turn in range(-(-work // programs)):
            one = piece(turn, plan, 128, heads, stack, form, 64, 1024)
            found += [one] if one[7] > 0 else []
    return found


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize("programs", [3, 132])
def test_pieces_of_chunks_cover_every_row_and_key_once(stack: int, programs: int) -> None:
    query_lens = [1, 64, 65, 2, 0, 300, 64, 64, 129, 17, 1, 64, 64, 64, 5]
    lengths = [9, 64, 2000, 5000, 0, 300, 1025, 16384, 4000, 1024, 7, 40000, 64, 70, 40]
    starts = np.cumsum([0, *query_lens]).tolist()
    queries, total = 128 // stack, starts[-1]
    rounds = [(0, range(total), 1)]
    rounds += [(1, range(a, min(a + 128, total)), 16) for a in range(0, total, 128)]
    done: dict[tuple[int, int, int], int] = {}
    for form, rows, splits in rounds:
        tiles = -(-len(rows) // queries) + len(query_lens) - 1
        plan = (_Pointer(starts), _Pointer(lengths), None, None, None, len(query_lens), tiles)
        plan += (splits, rows.start, rows.stop)
        for heads, _, s, row, count, first, tile, tiles, length, _ in _pieces(
            form, plan, programs, 8, stack
        ):
            assert (row, count, length) == (starts[s], query_lens[s], lengths[s])
            here = range(row + first, row + min(first + queries, count))
            for t in set(here) & set(rows):
                position = length - count + t - row
                for n in range(tile, min(tile + tiles, position // 128 + 1)):
                    done[t, heads, n] = done.get((t, heads, n), 0) + 1
    expected = {
        (starts[s] + i, heads, n)
        for s, count in enumerate(query_lens)
        for i in range(count if count > 1 else 0)
        for heads in range(8 // stack)
        for n in range((lengths[s] - count + i) // 128 + 1)
    }
    assert set(done) == expected
    assert set(done.values()) == {1}


def test_pieces_of_shared_prefixes_cover_every_member_and_key_once() -> None:
    members, starts = [3, 1, 4, 0, *range(6, 26), 0, 0], [0, 3, 24, 24]
    shared = [0] * 26
    for group, tokens in ((range(3), 1040), (range(3, 24), 4096)):
        for i in group:
            shared[members[i]] = tokens
    tiles = -(-len(members) // 16) + 2
    plan = (_Pointer(starts), _Pointer(shared), _Pointer(members), None, _Pointer([128, 256, 1]))
    plan += (3, tiles, 16, 0, 30)
    done: list[tuple[int, int, int]] = []
    for heads, _, s, row, count, first, tile, tiles, length, _ in _pieces(2, plan, 5, 8, 8):
        assert (s, length) == (members[row], shared[members[row]])
        for i in range(first, min(first + 16, count)):
            done += [(heads, members[row + i], n) for n in range(tile, tile + tiles)]
    expected = [(0, s, n) for s in members[:24] for n in range(-(-shared[s] // 128))]
    assert sorted(done) == sorted(expected)


@on_hopper
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 128), (8, 2, 64), (8, 1, 128)])
def test_rows_are_right_and_their_bits_their_own(
    rng: np.random.Generator, heads: int, kv_heads: int, size: int, block_size: int
) -> None:
    lengths = [65, 1, 128, 127, 129, 1000, 64, 2500, 1030, 3000, 1025, 40]
    query_lens = [65, 1, 128, 70, 129, 1000, 64, 333, 66, 64, 9, 2]
    paged = make_paged(rng, lengths, (kv_heads, size), dtype=torch.bfloat16, block_size=block_size)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), heads, size).bfloat16()
    found = _attend(q, paged, batch)
    assert_close(found, exact_attention(q, paged, batch, 0.1, None), tolerance=2e-2)
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
            assert torch.equal(again, found[rows]), f"{last} of {count} queries, length {length}"


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
    plan = plan_shared_prefix(paged.table.numpy(), np.array(lengths), np.array(query_lens))
    assert plan is not None
    q = floats(rng, sum(query_lens), heads, size).bfloat16()
    layer, there = _there(paged, batch)
    device = torch.device("cuda")
    found = shared_prefix_attention(q.cuda(), layer, there, 0.1, None, plan.to_device(device))
    expected = exact_attention(q, paged, batch, 0.1, None)
    assert_close(found.float().cpu(), expected, tolerance=2e-2)
