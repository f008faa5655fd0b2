"""Dense products with packed weights on Hopper: which are taken, when, and on a GPU what they
say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.planes import values_of
from octavo.planes import PLANE_LAYOUTS
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of, planes

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.launching.tickets import make_tickets  # isort: skip
from octavo.kernels.triton.product import choose  # isort: skip
from octavo.kernels.triton.product.choose import multiply_packed  # isort: skip
from octavo.kernels.triton.product.hopper import ring  # isort: skip
from octavo.kernels.triton.product.packed_shapes import RingShape, ring_shape  # isort: skip

KINDS = (
    *("int4_128_f16", "int4_32_bf16", "int8_64", "mxfp4", "nvfp4", "fp8"),
    *("q4_1", "q5_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
)
on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")


@pytest.mark.parametrize(
    ("kind", "rows", "cols", "is_taken"),
    [
        ("int4_128_f16", 128, 256, True),
        ("fp8", 64, 128, True),
        ("mxfp4", 64, 192, True),
        ("mxfp4", 64, 160, False),
        ("int4_128_f16", 128, 192, False),
        ("int4_128_f16", 96, 256, False),
        ("fp8_row", 128, 256, False),
        ("q4_1", 128, 192, True),
        ("q6_k", 128, 256, True),
        ("q3_k", 128, 256, True),
        ("q4_k", 128, 384, False),
    ],
)
def test_it_takes_what_it_can(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, cols: int, is_taken: bool
):
    layout = PLANE_LAYOUTS[kind]
    weight = planes(layout, rows, cols)
    x = torch.zeros(2, cols, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(ring, "has_wgmma", lambda device: False)
    assert not ring.fits(x, weight, layout)
    monkeypatch.setattr(ring, "has_wgmma", lambda device: True)
    assert ring.fits(x, weight, layout) == is_taken
    assert not ring.fits(x.float(), weight, layout)


def test_planes_are_copied_from_where_copies_can_begin():
    layout = PLANE_LAYOUTS["q4_k"]
    weight = planes(layout, 192, 256)
    assert ring.is_aligned(weight)
    assert ring.is_aligned(weight.rows(64, 128))
    assert not ring.is_aligned(weight.rows(8, 72))
    assert not ring.is_aligned(planes(layout, 72, 256))


def test_rows_that_are_to_be_invariant_and_many_go_elsewhere(monkeypatch: pytest.MonkeyPatch):
    layout = PLANE_LAYOUTS["int4_64_f16"]
    weight = planes(layout, 64, 128)
    values = values_of(layout, weight, 128).double()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty(3, 64, device=DEVICE)
    seen: list[int] = []
    monkeypatch.setattr(ring, "fits", lambda *_: True)
    monkeypatch.setattr(ring, "ring_product", lambda x, *_: seen.append(len(x)))
    for most, is_deterministic, taken in ((4, False, [3]), (4, True, []), (3, False, [])):
        monkeypatch.setattr(choose, "UNPACKED_TOKENS", most)
        seen.clear()
        multiply_packed(x, weight, layout, None, out, is_deterministic=is_deterministic)
        assert seen == taken
        assert taken or error_of(out, x.double() @ values.T) < 2e-6


@pytest.mark.parametrize("tokens", [1, 9, 33, 200])
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (6144, 4096), (4096, 14336)])
def test_splits_have_columns_of_their_own(tokens: int, rows: int, cols: int):
    shape = ring_shape(tokens, rows, cols, PLANE_LAYOUTS["int4_128_f16"])
    assert shape.tokens >= min(tokens, 64)
    assert not ring_shape(tokens, rows, cols, PLANE_LAYOUTS["q4_0"]).is_wide
    assert 1 <= shape.splits <= max(1, cols // 128 // (2 if tokens == 1 else 4))
    assert rows % shape.rows == 0


@on_hopper
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in KINDS),
        *((kind, torch.float16) for kind in ("int4_32_bf16", "q5_k", "mxfp4")),
    ],
    ids=str,
)
def test_products_equal_float64(kind: str, dtype: torch.dtype):
    layout, rows = PLANE_LAYOUTS[kind], 192
    cols = 1280 if layout.step == 256 else 1152
    weight, tickets = planes(layout, rows, cols), make_tickets(torch.device(DEVICE))
    values = values_of(layout, weight, cols).double()
    bias = torch.linspace(-1, 1, rows, device=DEVICE)
    for count in (1, 7, 16, 30, 130):
        x = torch.randn(count, cols, generator=torch.Generator().manual_seed(count))
        x = (x * 0.01).to(DEVICE, dtype)
        out = torch.full((count, rows + 8), float("nan"), device=DEVICE, dtype=dtype)[:, :rows]
        multiply_packed(x, weight, layout, bias, out, tickets, is_deterministic=False)
        assert error_of(out, x.double() @ values.T + bias) < 4e-3
        assert not tickets.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernel itself")
@pytest.mark.parametrize(
    ("kind", "is_late"),
    [*((kind, True) for kind in KINDS), *((kind, False) for kind in ("int4_32_bf16", "q5_k"))],
)
def test_products_equal_float64_without_a_gpu(kind: str, is_late: bool):
    layout, rows = PLANE_LAYOUTS[kind], 128
    cols = 768 if layout.step == 256 else 640 if layout.group == 128 else 576
    emulator = emulated("octavo.kernels.triton.product.hopper.ring", is_late=is_late)
    weight = planes(layout, rows, cols)
    bias = torch.linspace(-1, 1, rows)
    narrow = RingShape(tokens=8, rows=64, num_warps=4, stages=2, tiles=2, is_wide=False)
    for count, dtype, shape in (
        (1, torch.bfloat16, narrow),
        (1, torch.bfloat16, replace(narrow, stages=3, splits=2)),
        (11, torch.float16, replace(narrow, stages=4, tiles=1, splits=2)),
        (3, torch.bfloat16, replace(narrow, stages=3, is_wide=layout.group == 128)),
    ):
        x = torch.randn(count, cols, generator=torch.Generator().manual_seed(count)).to(dtype)
        out, tickets = torch.empty(count, rows + 8)[:, :rows], make_tickets(torch.device("cpu"))
        emulator.ring_product(x, weight, layout, bias, out, shape, tickets)
        expected = x.double() @ values_of(layout, weight, cols).double().T + bias
        assert error_of(out, expected) < 1e-4
        assert not tickets.any()
