"""Hopper's prefill attention: what it takes, that it compiles anywhere, and, on a Hopper, its rows.

NaN lies in every slot that no token owns.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.ops import AttentionBatch, KVLayer
from tests.kernels.cases import PagedKV, assert_close, exact_attention, floats, make_paged
from tests.kernels.triton_interpreter import DEVICE

from octavo.kernels.triton import attention as tiles  # isort: skip
from octavo.kernels.triton import attention_hopper as hopper  # isort: skip

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
from octavo.kernels.triton.attention_hopper import _hopper_kernel

kernel = _hopper_kernel._function

page = f"tensordesc<bf16[1,16,64],{gl.NVMMASharedLayout(128, 16, 3)!r}>"
rows = f"tensordesc<bf16[64,128],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
types = {"queries": rows, "key": page, "value": page, "out": "*bf16", "scale_log2": "fp32"}
types |= dict.fromkeys(("query_starts", "seq_lens", "block_table"), "*i32")
types |= dict.fromkeys(("num_sequences", "num_tiles", "stride_table"), "i32")
constants = {"H": 8, "GROUP": 4, "D": 128, "SHORT": 64, "ROWS": 64, "BLOCK_N": 128, "STAGES": 2}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
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
    arena = torch.stack((paged.layer.key, paged.layer.value), 1).cuda()
    there = AttentionBatch(
        positions_T=batch.positions_T.cuda(),
        slot_mapping_T=batch.slot_mapping_T.cuda(),
        query_starts=batch.query_starts.cuda(),
        seq_lens_S=batch.seq_lens_S.cuda(),
        block_table=batch.block_table.cuda(),
    )
    layer = KVLayer(key=arena[:, 0], value=arena[:, 1])
    assert hopper.fits(q.cuda(), layer, None)
    return tiles.attention(q.cuda(), layer, there, 0.1, None).float().cpu()


@on_hopper
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 128), (8, 2, 64), (8, 1, 128)])
def test_rows_are_right_and_their_bits_their_own(
    rng: np.random.Generator, heads: int, kv_heads: int, size: int, block_size: int
) -> None:
    lengths = [65, 1, 128, 127, 129, 1000, 64, 2500, 1030]
    query_lens = [65, 1, 128, 70, 129, 1000, 64, 333, 66]
    paged = make_paged(rng, lengths, (kv_heads, size), dtype=torch.bfloat16, block_size=block_size)
    batch = paged.batch(lengths, query_lens)
    q = floats(rng, sum(query_lens), heads, size).bfloat16()
    found = _attend(q, paged, batch)
    assert_close(found, exact_attention(q, paged, batch, 0.1, None), tolerance=2e-2)
    for s, (length, count) in enumerate(zip(lengths, query_lens, strict=True)):
        end = sum(query_lens[: s + 1])
        for last in {count, max(65, count // 2), 65} if count > 64 else ():
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
