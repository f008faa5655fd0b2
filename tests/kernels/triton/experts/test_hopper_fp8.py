"""Experts in FP8 on Hopper: what they take, that they compile, and on a GPU what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import LARGEST, error_of, packed_experts, rounded_experts

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.experts.hopper import fp8  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.small.quantize import quantize_rows, warps_of  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
TOP_K = 2


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("choices", [0, 3])
def test_rows_are_rounded_once_and_put_in_their_places(by_block: bool, choices: int):
    generator = torch.Generator().manual_seed(choices)
    x = torch.randn(5, 384, generator=generator).to(DEVICE)
    places = torch.randperm(15, generator=generator).int().to(DEVICE)
    places[4] = -1
    rows = quantize_rows(x, 384, by_block=by_block, places_P=places if choices else None)
    groups = x.view(5, 3, 128) if by_block else x.view(5, 1, 384)
    scales = groups.abs().amax(2) / LARGEST
    numbers = (groups / scales[:, :, None]).to(torch.float8_e4m3fn).float().view(5, 384)
    in_words = numbers.view(5, 12, 2, 16).transpose(2, 3).reshape(5, 384)
    for row in range(len(rows.numbers)):
        if not choices:
            token = row
        elif row not in places:
            continue
        else:
            token = int((places == row).nonzero()) // choices
        assert torch.equal(rows.numbers[row].float(), in_words[token])
        assert torch.allclose(rows.scales[:, row], scales[token], rtol=1e-6)


def test_rows_of_any_width_have_a_number_of_warps_that_triton_takes():
    assert {warps_of(128 * count) for count in range(1, 100)} == {1, 2, 4, 8}


@pytest.mark.parametrize(("blocks", "columns"), [(1, 5), (16, 3), (37, 4), (50, 1)])
def test_blocks_go_through_the_columns_together(blocks: int, columns: int):
    tiles = emulated("octavo.kernels.triton.tiles.hopper.fp8", is_late=False)
    found = [tiles.place_of(unit, blocks, columns) for unit in range(blocks * columns)]
    places = [(int(block), int(column)) for block, column in found]
    assert sorted(places) == [
        (block, column) for block in range(blocks) for column in range(columns)
    ]
    for place, following in pairwise(places):
        together = place[0] // tiles.TOGETHER == following[0] // tiles.TOGETHER
        assert following[1] - place[1] in ((0, 1) if together else (1 - columns,))


@pytest.mark.parametrize(
    ("change", "num_pairs", "is_taken"),
    [
        ({}, 4, True),
        ({}, 400, True),
        ({"is_by_tile": False}, 4, True),
        ({"is_by_tile": False}, 400, False),
        ({"gate": "fp8_row", "down": "fp8_row", "is_by_tile": False}, 400, True),
        ({"gate": "fp8_row"}, 4, False),
        ({"gate": "q8_0", "down": "q8_0"}, 4, False),
        ({"hidden": 384}, 4, False),
        ({"inner": 64}, 4, False),
        ({"activation": "gelu_tanh"}, 4, False),
    ],
)
def test_it_takes_what_it_can(
    change: dict[str, object], num_pairs: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
):
    case = {"gate": "fp8", "down": "fp8", "hidden": 256, "inner": 128, "is_by_tile": True}
    case |= {"activation": "silu"} | change
    sizes = 2, case["hidden"], case["inner"]
    experts, _ = packed_experts(case["gate"], case["down"], *sizes)
    experts = replace(experts, is_by_tile=case["is_by_tile"])
    x = torch.zeros(2, case["hidden"], dtype=torch.bfloat16)
    assert not fp8.fits(x, experts, case["activation"], num_pairs), "a CPU is no Hopper"
    monkeypatch.setattr(fp8, "has_wgmma", lambda device: True)
    assert fp8.fits(x, experts, case["activation"], num_pairs) == is_taken


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.triton.experts.hopper import fp8
from octavo.kernels.triton.tiles.hopper.fp8 import TILE_LAYOUT

kernel = fp8.fp8_pieces_kernel._function
types = dict.fromkeys(("x_scales", "first_scales", "second_scales", "out_scales"), "*fp32")
types |= {"weights_P": "*fp32", "order_P": "*i32", "blocks_3B": "*i32"}
numbers = ("num_blocks", "num_places", "num_rows", "scale_stride", "out_stride", "steps")
types |= dict.fromkeys((*numbers, "columns"), "i32")


def build(shape, is_gated, by_block, by_tile=True):
    box = shape.rows if shape.is_few else 64
    types["x"] = f"tensordesc<fp8e4nv[{box},128],{TILE_LAYOUT!r}>"
    types["first"] = types["second"] = f"tensordesc<fp8e4nv[{shape.box},128],{TILE_LAYOUT!r}>"
    types["out"] = "*fp8e4nv" if is_gated and by_block else "*bf16"
    values = {"ROWS": shape.rows, "STAGES": shape.stages, "IS_FEW": shape.is_few, "OVERLAP": 1}
    values |= {"IS_GATED": is_gated, "BY_BLOCK": by_block, "BY_TILE": by_tile}
    values |= {"REGISTERS": fp8.PRODUCER_REGISTERS, "AT_ONCE": shape.at_once}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    at = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(kernel, signature, at)
    options = {"num_warps": 4, "maxnreg": shape.max_registers}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["ptx"].count("wgmma.mma_async") > 0
    assert built.metadata.shared <= 227 * 1024


build(fp8.SHAPES[0], True, True)
build(fp8.SHAPES[1], False, True, by_tile=False)
build(fp8.SHAPES[0], False, False)
build(fp8.SHAPES[2], True, False)
build(fp8.SHAPES[3], True, True)
build(fp8.SHAPES[3], False, True)
"""


def test_it_compiles_for_hopper_without_one() -> None:
    compiler = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@on_hopper
@pytest.mark.parametrize("name", ["fp8", "fp8_row"])
@pytest.mark.parametrize("sizes", [(8, 512, 384), (3, 1024, 128)])
@pytest.mark.parametrize("count", [2, 40, 70, 150, 1100])
def test_products_are_those_of_rounded_rows(name: str, sizes: tuple[int, int, int], count: int):
    experts, values = packed_experts(name, name, *sizes)
    experts = replace(experts, is_by_tile=name == "fp8")
    num_experts, hidden_size, _ = sizes
    generator = torch.Generator(DEVICE).manual_seed(count)
    x = torch.randn(count, hidden_size, generator=generator, device=DEVICE).bfloat16()
    drawn = torch.rand(count, num_experts, generator=generator, device=DEVICE)
    weights, ids = drawn.topk(TOP_K)
    ids[0, 0] = -1
    case = x, weights, ids.int()
    found = fp8.hopper_fp8_experts(*case, experts)
    # Sums in FP8 tensor cores have fewer bits than float32: some numbers between the products are
    # rounded to the neighbour of the one expected, up to an eighth away.
    assert error_of(found, rounded_experts(*case, values, by_block=name == "fp8")) < 2e-2


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize(
    ("name", "count", "by_tile", "is_late"),
    [
        ("fp8", 4, True, True),
        ("fp8", 20, False, False),
        ("fp8", 90, True, True),
        ("fp8_row", 25, False, True),
    ],
)
def test_products_are_those_of_rounded_rows_without_a_gpu(
    name: str, count: int, by_tile: bool, is_late: bool
):
    emulator = emulated("octavo.kernels.triton.experts.hopper.fp8", is_late=is_late)
    emulator.num_processors = lambda device: 1  # so that rings go round
    experts, values = packed_experts(name, name, 2, 256, 256)
    experts = replace(experts, is_by_tile=by_tile)
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 256, generator=generator).bfloat16()
    weights, ids = torch.rand(count, 2, generator=generator).topk(TOP_K)
    ids[0, 0] = -1
    case = x, weights, ids.int()
    found = emulator.hopper_fp8_experts(*case, experts)
    assert error_of(found, rounded_experts(*case, values, by_block=name == "fp8")) < 1e-2
