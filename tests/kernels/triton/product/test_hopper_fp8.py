"""Dense products of FP8 with FP8 on Hopper: who takes them, that they compile, what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.kernels.inputs import NormInput
from octavo.kernels.planes import Planes, has_tile_scales, values_of
from octavo.kernels.weights import Weight
from octavo.planes import FP8_BLOCK, FP8_ROW, PLANE_LAYOUTS, PlaneLayout
from tests.kernels.triton.cases import make_ops
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of, fp8_weight, planes, rounded

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.product import choose  # isort: skip
from octavo.kernels.triton.product.hopper import fp8, fp8_few  # isort: skip
from octavo.kernels.triton.product.matrices import prepared  # isort: skip
from octavo.kernels.triton.small.norm import rms_norm  # isort: skip
from octavo.kernels.triton.small.norm_quantize import norm_quantize  # isort: skip
from octavo.kernels.triton.small.quantize import Fp8Rows, quantize_rows  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")


def values_of_rows(rows: Fp8Rows) -> Tensor:
    """Returns what rows in FP8 stand for, columns in order."""
    numbers = rows.numbers.double().view(len(rows.numbers), -1, 16, 2).transpose(2, 3).flatten(1)
    width = numbers.shape[1] // len(rows.scales)
    return numbers * rows.scales.T.double().repeat_interleave(width, 1)


def test_a_scale_that_a_tile_does_not_share_is_seen():
    made = planes(FP8_BLOCK, 256, 256)
    assert has_tile_scales(made, FP8_BLOCK)
    assert not has_tile_scales(made.rows(0, 200), FP8_BLOCK)
    made.scales[130, 1] += 1
    assert not has_tile_scales(made, FP8_BLOCK)
    assert not has_tile_scales(planes(FP8_ROW, 256, 256), FP8_ROW)


@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_the_norm_rounds_what_the_norm_and_then_the_rounding_give(num_parts: int):
    generator = torch.Generator().manual_seed(num_parts)
    residual, weight = (
        torch.randn(*sizes, generator=generator).to(DEVICE) for sizes in ((5, 384), (384,))
    )
    x = None
    if num_parts:
        x = torch.randn(5, num_parts, 384, generator=generator).to(DEVICE)
        x = x[:, 0].contiguous() if num_parts == 1 else x
    kept = residual.clone()
    if x is None:
        normed, made = rms_norm(residual, None, weight, 1e-6), None
        made = norm_quantize(residual, None, weight, 1e-6)
    else:
        normed, made = rms_norm(x, residual, weight, 1e-6), norm_quantize(x, kept, weight, 1e-6)
        assert torch.equal(kept, residual)
    assert (
        error_of(values_of_rows(made), values_of_rows(quantize_rows(normed, 384, by_block=True)))
        < 1e-3
    )
    assert 1e-3 < error_of(values_of_rows(made), normed) < 4e-2


@pytest.mark.parametrize(
    ("change", "taker"),
    [
        ({}, "many"),
        ({"count": 255}, "few"),
        ({"count": 2}, "few"),
        ({"count": 1}, None),
        ({"rows": 320}, None),
        ({"count": 3, "rows": 320}, "few"),
        ({"count": 3, "rows": 336}, None),
        ({"cols": 160}, "many"),
        ({"count": 3, "cols": 16512, "rows": 64}, None),
        ({"layout": FP8_ROW}, None),
        ({"count": 3, "layout": FP8_ROW, "is_by_tile": False}, "few"),
        ({"count": 3, "layout": PLANE_LAYOUTS["q8_0"], "is_by_tile": False}, None),
        ({"dtype": torch.float32}, None),
        ({"count": 3, "dtype": torch.float32}, None),
        ({"is_by_tile": False}, None),
        ({"count": 3, "is_by_tile": False}, None),
    ],
)
def test_rows_meet_published_scales_in_fp8_from_the_second_on(
    change: dict[str, object], taker: str | None, monkeypatch: pytest.MonkeyPatch
):
    case = {"count": 256, "rows": 384, "cols": 128, "layout": FP8_BLOCK, "dtype": torch.bfloat16}
    case |= {"is_by_tile": True} | change
    weight = fp8_weight(case["layout"], case["rows"], case["cols"])
    x = torch.ones(case["count"], case["cols"], dtype=case["dtype"], device=DEVICE)
    out = x.new_empty((len(x), weight.rows))
    taken: list[tuple[str, bool]] = []

    def unrounded(x: Tensor, padded: int, *, by_block: bool) -> Fp8Rows:
        return Fp8Rows(x.new_empty(len(x), padded), x.new_empty(0))

    monkeypatch.setattr(choose, "quantize_rows", unrounded)
    for product in (fp8, fp8_few):
        monkeypatch.setattr(product, "has_wgmma", lambda device: True)
    many, few = "hopper_fp8_product_of", "fp8_few_product"
    monkeypatch.setattr(fp8, many, lambda *rest: taken.append(("many", rest[4] is out)))
    monkeypatch.setattr(fp8_few, few, lambda *rest: taken.append(("few", rest[4] is out)))
    monkeypatch.setattr(choose, "fp8_product", lambda *rest: None)
    monkeypatch.setattr(choose, "packed_product", lambda *rest: None)
    assert weight.planes is not None
    assert weight.layout is not None
    rest = weight.planes, weight.layout, None, out
    choose.multiply_packed(x, *rest, is_deterministic=True, is_by_tile=case["is_by_tile"])
    assert not taken
    choose.multiply_packed(x, *rest, is_deterministic=False, is_by_tile=case["is_by_tile"])
    assert taken == ([] if taker is None else [(taker, True)])


@pytest.mark.parametrize("has_x", [True, False])
def test_a_norm_before_such_a_product_rounds(has_x: bool, monkeypatch: pytest.MonkeyPatch):
    weight = fp8_weight(FP8_BLOCK, 256, 128)
    weights = prepared((weight,))
    (found,) = weights
    assert isinstance(found, Weight)
    assert found.is_by_tile
    generator = torch.Generator().manual_seed(3)
    x, residual, norm = (
        torch.randn(*sizes, generator=generator).to(DEVICE, torch.bfloat16)
        for sizes in ((4, 128), (4, 128), (128,))
    )

    def product_of(rows: Fp8Rows, made: Planes, layout: PlaneLayout, bias: None, out: Tensor):
        out.copy_(values_of_rows(rows) @ values_of(layout, made, 128).double().T)

    monkeypatch.setattr(choose, "FP8_TOKENS", 4)
    monkeypatch.setattr(fp8, "has_wgmma", lambda device: True)
    monkeypatch.setattr(fp8_few, "has_wgmma", lambda device: False)  # it takes fewer rows
    monkeypatch.setattr(fp8, "hopper_fp8_product_of", product_of)
    rows = NormInput(x_TM=x if has_x else None, residual_TM=residual, weight_M=norm, eps=1e-6)
    added = residual.clone()
    normed = rms_norm(x, added, norm, 1e-6) if has_x else rms_norm(added, None, norm, 1e-6)
    made, left = make_ops(is_deterministic=False).norm_linear(rows, weights)
    assert torch.equal(left, added)
    assert weight.planes is not None
    values = values_of(FP8_BLOCK, weight.planes, 128).double()
    assert error_of(made, rounded(normed, by_block=True) @ values.T) < 5e-3
    few = replace(rows, x_TM=None, residual_TM=residual[:3])
    assert not choose.takes_normed(few, found)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.product.hopper import fp8
from octavo.kernels.triton.tiles.hopper.fp8 import TILE_LAYOUT

kernel = fp8.fp8_rows_kernel._function
types = {"x_scales": "*fp32", "scales": "*fp32", "bias_N": "*bf16", "out_TN": "*bf16"}
numbers = ("num_tokens", "num_rows", "scale_stride", "out_stride", "columns", "steps")
types |= dict.fromkeys(numbers, "i32")
types["x"] = f"tensordesc<fp8e4nv[64,128],{TILE_LAYOUT!r}>"
types["weight"] = f"tensordesc<fp8e4nv[128,128],{TILE_LAYOUT!r}>"

values = {"BY_BLOCK": True, "HAS_BIAS": True, "STAGES": fp8.STAGES, "OVERLAP": True}
values |= {"REGISTERS": fp8.PRODUCER_REGISTERS}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
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


@on_hopper
@pytest.mark.parametrize("layout", [FP8_BLOCK, FP8_ROW], ids=["fp8", "fp8_row"])
@pytest.mark.parametrize("sizes", [(256, 128), (384, 512), (1280, 1024)])
@pytest.mark.parametrize("count", [1, 130, 600, 3000])
def test_products_are_those_of_rounded_rows(
    layout: PlaneLayout, sizes: tuple[int, int], count: int
):
    made = planes(layout, *sizes)
    values = values_of(layout, made, sizes[1]).double()
    generator = torch.Generator(DEVICE).manual_seed(count)
    x = torch.randn(count, sizes[1], generator=generator, device=DEVICE).bfloat16()
    whole = torch.empty(count, sizes[0] + 64, device=DEVICE, dtype=torch.bfloat16)
    by_block = layout.group > 0
    expected = rounded(x, by_block=by_block) @ values.T
    for bias in (None, torch.linspace(-1, 1, sizes[0], device=DEVICE)):
        out = whole.fill_(7)[:, : sizes[0]]
        fp8.hopper_fp8_product_of(
            quantize_rows(x, sizes[1], by_block=by_block), made, layout, bias, out
        )
        assert error_of(out, expected if bias is None else expected + bias) < 5e-3
        assert bool((whole[:, sizes[0] :] == 7).all())


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize(("layout", "is_late"), [(FP8_BLOCK, True), (FP8_ROW, False)])
def test_products_are_those_of_rounded_rows_without_a_gpu(layout: PlaneLayout, is_late: bool):
    emulator = emulated("octavo.kernels.triton.product.hopper.fp8", is_late=is_late)
    emulator.num_processors = lambda device: 1  # so that rings go round
    made, by_block = planes(layout, 384, 256), layout.group > 0
    x = torch.randn(150, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = torch.full((150, 448), 7.0, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 384) if by_block else None
    rows = quantize_rows(x, 256, by_block=by_block)
    emulator.hopper_fp8_product_of(rows, made, layout, bias, whole[:, :384])
    expected = rounded(x, by_block=by_block) @ values_of(layout, made, 256).double().T
    expected = expected if bias is None else expected + bias
    assert error_of(whole[:, :384], expected) < 5e-3
    assert bool((whole[:, 384:] == 7).all())
