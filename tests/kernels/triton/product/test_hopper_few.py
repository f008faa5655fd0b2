"""Dense products of 16-bit weights with few rows on Hopper: who takes them, what they say."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.product import choose  # isort: skip
from octavo.kernels.triton.product.hopper import few  # isort: skip
from octavo.kernels.triton.product.packed_shapes import FewShape, few_numbers_shape  # isort: skip
from octavo.kernels.triton.tuning.shapes import Shapes  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")


@pytest.mark.parametrize("num_tokens", [2, 32, 64])
@pytest.mark.parametrize("sizes", [(5120, 2880), (2880, 4096), (2048, 4096), (16384, 128)])
def test_all_programs_are_there_at_once(num_tokens: int, sizes: tuple[int, int]):
    steps = sizes[1] // 64
    shape = few_numbers_shape(num_tokens, sizes[0], steps)
    of_processor = max(2, -(-(sizes[0] // 64) * shape.splits // 132))
    room = (208 << 10) // of_processor // ((64 + shape.tokens) * 128)
    assert shape.stages == max(2, min(room, -(-steps // shape.splits)))
    assert shape.tokens >= num_tokens


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"count": 1}, False),
        ({"count": 16}, True),
        ({"count": 17}, False),
        ({"count": 17, "least": 2048 * 128}, True),
        ({"count": 33, "least": 0}, False),
        ({"rows": 1984}, False),
        ({"rows": 2056}, False),
        ({"cols": 96}, False),
        ({"dtype": torch.float32}, False),
    ],
)
def test_few_rows_of_large_matrices_are_taken(
    change: dict[str, object], is_taken: bool, monkeypatch: pytest.MonkeyPatch
):
    case = {"count": 3, "rows": 2048, "cols": 128, "dtype": torch.bfloat16} | change
    monkeypatch.setattr(choose, "FEW_NUMBERS", case.get("least", 1 << 40))
    x = torch.ones(case["count"], case["cols"], dtype=case["dtype"], device=DEVICE)
    weight = torch.ones(case["rows"], case["cols"], dtype=case["dtype"], device=DEVICE)
    out = x.new_empty((len(x), len(weight)))
    taken: list[bool] = []
    monkeypatch.setattr(few, "has_wgmma", lambda device: True)
    monkeypatch.setattr(few, "few_product", lambda *rest: taken.append(rest[3] is out))
    rest = weight, None, out, Shapes(), torch.zeros(99, dtype=torch.int32, device=DEVICE)
    choose.multiply(x, *rest, is_deterministic=True)
    assert not taken
    choose.multiply(x, *rest, is_deterministic=False)
    assert taken == [True] * is_taken


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize(
    ("sizes", "shape", "is_late"),
    [
        ((70, 128, 512), FewShape(tokens=64, stages=3, splits=1), True),
        ((5, 128, 320), FewShape(tokens=8, stages=2, splits=2), False),
        ((3, 64, 192), FewShape(tokens=8, stages=3, splits=1), True),
    ],
)
def test_products_equal_float64_without_a_gpu(
    sizes: tuple[int, int, int], shape: FewShape, is_late: bool
):
    emulator = emulated("octavo.kernels.triton.product.hopper.few", is_late=is_late)
    count, rows, cols = sizes
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, cols, generator=generator).bfloat16() for n in (count, rows))
    whole = torch.full((count, rows + 64), 7.0)
    bias = torch.linspace(-1, 1, rows) if rows == 128 else None
    emulator.few_product(x, weight, bias, whole[:, :rows], shape)
    expected = x.double() @ weight.double().T
    assert error_of(whole[:, :rows], expected if bias is None else expected + bias) < 1e-6
    assert bool((whole[:, rows:] == 7).all())


@on_hopper
@pytest.mark.parametrize("sizes", [(2048, 128), (2880, 4096), (5120, 2880)])
@pytest.mark.parametrize("count", [2, 20, 32])
def test_products_equal_float64(sizes: tuple[int, int], count: int):
    generator = torch.Generator(DEVICE).manual_seed(count)
    x, weight = (
        torch.randn(n, sizes[1], generator=generator, device=DEVICE).bfloat16()
        for n in (count, sizes[0])
    )
    tickets = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    expected = x.double() @ weight.double().T
    for bias in (None, torch.linspace(-1, 1, sizes[0], device=DEVICE)):
        whole = torch.full((count, sizes[0] + 64), 7.0, device=DEVICE, dtype=torch.bfloat16)
        out = whole[:, : sizes[0]]
        choose.multiply(x, weight, bias, out, Shapes(), tickets, is_deterministic=False)
        assert error_of(out, expected if bias is None else expected + bias) < 5e-3
        assert bool((whole[:, sizes[0] :] == 7).all())
        assert not bool(tickets.any())
