"""Dense products of FP8 with FP8 on Hopper, few rows: their shapes, that they compile, what they
say. Who takes them: test_hopper_fp8.py."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import NormInput
from octavo.kernels.planes import Planes, values_of
from octavo.planes import FP8_BLOCK, FP8_ROW, PlaneLayout
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of, fp8_weight, planes, rounded

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.product import choose  # isort: skip
from octavo.kernels.triton.product.hopper import fp8_few  # isort: skip
from octavo.kernels.triton.product.packed_shapes import FewShape, few_shape  # isort: skip
from octavo.kernels.triton.small.quantize import quantize_rows  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")


@pytest.mark.parametrize("num_tokens", [1, 2, 32, 33, 200])
@pytest.mark.parametrize(
    "sizes", [(6144, 4096), (2048, 4096), (64, 128), (5120, 2304), (4096, 14336)]
)
def test_shapes_fit_a_processor_and_split_whole_tiles(num_tokens: int, sizes: tuple[int, int]):
    steps = sizes[1] // 128
    shape = few_shape(num_tokens, sizes[0], steps)
    assert steps % shape.splits == 0
    assert 0 < shape.stages <= steps // shape.splits
    scales = 4 * shape.tokens * max(16, 1 << (steps // shape.splits - 1).bit_length())
    assert shape.stages * (64 + shape.tokens) * 128 + scales <= 208 << 10
    assert num_tokens > 64 or shape.tokens >= num_tokens


@pytest.mark.parametrize("layout", [FP8_BLOCK, FP8_ROW], ids=["fp8", "fp8_row"])
def test_a_norm_before_few_rows_rounds_them(layout: PlaneLayout, monkeypatch: pytest.MonkeyPatch):
    weight = fp8_weight(layout, 128, 256)
    weight = replace(weight, is_by_tile=layout.group > 0)
    monkeypatch.setattr(fp8_few, "has_wgmma", lambda device: True)
    residual = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows = NormInput(
        x_TM=None,
        residual_TM=residual.to(DEVICE),
        weight_M=torch.ones(256, dtype=torch.bfloat16, device=DEVICE),
        eps=1e-6,
    )
    assert choose.takes_normed(rows, weight)
    seen: list[Tensor] = []

    def product(
        rows: object, made: Planes, of: PlaneLayout, bias: None, out: Tensor, *rest: object
    ):
        seen.append(out.zero_())

    monkeypatch.setattr(fp8_few, "fp8_few_product", product)
    out, left = choose.norm_fp8_product(rows, weight, None)
    assert left is rows.residual_TM
    assert [one is out for one in seen] == [True]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.product.hopper import fp8_few
from octavo.kernels.triton.tiles.hopper.fp8 import TILE_LAYOUT

kernel = fp8_few.fp8_few_kernel._function
types = dict.fromkeys(("x_scales_GT", "scales", "sums_STN", "bias_N"), "*fp32")
types |= {"tickets": "*i32", "out_TN": "*bf16"}
types |= dict.fromkeys(("num_tokens", "num_rows", "scale_stride", "out_stride"), "i32")
types["weight"] = f"tensordesc<fp8e4nv[64,128],{TILE_LAYOUT!r}>"


def build(tokens, steps, stages, splits, by_block):
    types["x"] = f"tensordesc<fp8e4nv[{tokens},128],{TILE_LAYOUT!r}>"
    values = {"TOKENS": tokens, "STEPS": steps, "STAGES": stages, "SPLITS": splits}
    values |= {"BY_BLOCK": by_block, "HAS_BIAS": True, "OVERLAP": True}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    at = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(kernel, signature, at)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["ptx"].count("wgmma.mma_async") > 0
    assert built.metadata.shared <= 227 * 1024


build(32, 16, 16, 1, True)
build(64, 32, 12, 2, False)
build(8, 9, 9, 1, True)
build(64, 112, 11, 1, True)
"""


def test_it_compiles_for_hopper_without_one() -> None:
    compiler = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def weight_and_values(layout: PlaneLayout, rows: int, cols: int) -> tuple[Planes, Tensor]:
    made = planes(layout, rows, cols)
    return made, values_of(layout, made, cols).double()


@on_hopper
@pytest.mark.parametrize("layout", [FP8_BLOCK, FP8_ROW], ids=["fp8", "fp8_row"])
@pytest.mark.parametrize("sizes", [(128, 128), (384, 1152), (2048, 4096)])
@pytest.mark.parametrize("count", [2, 20, 64, 255])
def test_products_are_those_of_rounded_rows(
    layout: PlaneLayout, sizes: tuple[int, int], count: int
):
    made, values = weight_and_values(layout, *sizes)
    generator = torch.Generator(DEVICE).manual_seed(count)
    x = torch.randn(count, sizes[1], generator=generator, device=DEVICE).bfloat16()
    whole = torch.empty(count, sizes[0] + 64, device=DEVICE, dtype=torch.bfloat16)
    tickets = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    expected = rounded(x, by_block=True) @ values.T
    for bias in (None, torch.linspace(-1, 1, sizes[0], device=DEVICE)):
        out = whole.fill_(7)[:, : sizes[0]]
        choose.multiply_packed(
            *(x, made, layout, bias, out, tickets),
            is_deterministic=False,
            is_by_tile=layout.group > 0,
        )
        assert error_of(out, expected if bias is None else expected + bias) < 5e-3
        assert bool((whole[:, sizes[0] :] == 7).all())
        assert not bool(tickets.any())


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize(
    ("layout", "count", "shape", "is_late"),
    [
        (FP8_BLOCK, 70, FewShape(tokens=64, stages=3, splits=1), True),
        (FP8_ROW, 5, FewShape(tokens=8, stages=2, splits=2), False),
        (FP8_ROW, 3, FewShape(tokens=8, stages=4, splits=1), True),
    ],
)
def test_products_are_those_of_rounded_rows_without_a_gpu(
    layout: PlaneLayout, count: int, shape: FewShape, is_late: bool
):
    emulator = emulated("octavo.kernels.triton.product.hopper.fp8_few", is_late=is_late)
    made, values = weight_and_values(layout, 128, 512)
    x = torch.randn(count, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = torch.full((count, 192), 7.0)
    bias = torch.linspace(-1, 1, 128) if layout.group else None
    rows = quantize_rows(x, 512, by_block=True)
    emulator.fp8_few_product(rows, made, layout, bias, whole[:, :128], shape)
    expected = rounded(x, by_block=True) @ values.T
    assert error_of(whole[:, :128], expected if bias is None else expected + bias) < 1e-6
    assert bool((whole[:, 128:] == 7).all())
