"""Experts with packed weights on Hopper: which are taken, when, and on a GPU what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.activations import ClampedSwiGLU
from octavo.planes import PLANE_LAYOUTS
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import (
    error_of,
    expected_experts,
    found_experts,
    packed_experts,
    rounded_experts,
    with_biases,
)

from tests.kernels.triton.gluon_cpu import emulated  # isort: skip
from octavo.kernels.triton.experts import choose, choose_packed  # isort: skip
from octavo.kernels.triton.experts.hopper import fp8 as hopper_fp8  # isort: skip
from octavo.kernels.triton.experts.hopper import ring  # isort: skip
from octavo.kernels.triton.experts.shapes import RingExpertsShape, ring_experts_shape  # isort: skip
from octavo.kernels.triton.launching.chip import has_wgmma  # isort: skip
from octavo.kernels.triton.product.packed_shapes import RingShape  # isort: skip
from octavo.kernels.triton.tuning.shapes import Shapes  # isort: skip

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
COUNT, HIDDEN, INNER, TOP_K = 4, 256, 384, 2
KINDS = (
    *("int4_128_f16", "int4_64_bf16", "int4_32_f16", "int8_128", "q8_0", "q4_0", "q4_1", "q5_0"),
    *("mxfp4", "nvfp4", "fp8", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
CLAMPED = ClampedSwiGLU(alpha=1.7, limit=1.0)
SMALL = (("fp8", "int8_128"), ("mxfp4", "q8_0"))
"""Whose gates stay a power of two too small, in bfloat16."""


def inputs(
    count: int, dtype: torch.dtype, hidden: int = HIDDEN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, hidden, generator=generator).to(dtype)
    order = [torch.randperm(COUNT, generator=generator)[:TOP_K] for _ in range(count)]
    ids = torch.stack(order).int()
    ids[-1, 0] = -1
    weights = torch.rand(count, TOP_K, generator=generator)
    return x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)


def test_a_lone_token_has_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, _ = packed_experts("int4_128_f16", "int4_128_f16", COUNT, HIDDEN, INNER)
    wanted: list[bool] = []

    def run(x: torch.Tensor, *rest: object, in_parts: bool) -> torch.Tensor:
        wanted.append(in_parts)
        return x

    monkeypatch.setattr(choose_packed.ring, "fits", lambda *arguments: True)
    monkeypatch.setattr(choose_packed.ring, "ring_experts", run)
    for count in (1, 40):
        choose.run_experts(
            *(*inputs(count, torch.bfloat16), experts, "silu", None, None, Shapes()),
            is_deterministic=False,
            in_parts=True,
        )
    assert wanted == [False, True]


@pytest.mark.parametrize(
    ("kinds", "inner", "is_taken"),
    [
        (("int4_128_f16", "int4_32_bf16"), INNER, True),
        (("mxfp4", "q8_0"), INNER, True),
        (("int4_128_f16", "q4_k"), INNER, False),
        (("q4_k", "q6_k"), 512, True),
        (("q5_0", "nvfp4"), 512, True),
        (("int4_64_f16", "int4_64_f16"), 64 * 5, True),
        (("int4_64_f16", "fp8_row"), INNER, False),
        (("int4_64_f16", "mxfp4"), 32 * 5, False),
    ],
)
def test_it_takes_what_it_can(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str], inner: int, is_taken: bool
):
    experts, _ = packed_experts(*kinds, COUNT, HIDDEN, inner)
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(ring, "has_wgmma", lambda device: False)
    assert not ring.fits(x, experts)
    monkeypatch.setattr(ring, "has_wgmma", lambda device: True)
    assert ring.fits(x, experts) == is_taken
    assert not ring.fits(x.float(), experts)
    assert ring.fits(x, with_biases(experts)) == is_taken


@pytest.mark.parametrize(
    ("name", "large", "is_taken"),
    [("fp8", INNER + 1, False), ("fp8", INNER, True), ("int8_128", INNER + 1, True)],
)
def test_a_lone_token_goes_in_pairs_through_small_fp8_experts(
    monkeypatch: pytest.MonkeyPatch, name: str, large: int, is_taken: bool
):
    monkeypatch.setattr(choose_packed, "LARGE_INNER", large)
    experts, values = packed_experts(name, name, COUNT, HIDDEN, INNER)
    said = torch.zeros(1, HIDDEN, device=DEVICE)
    monkeypatch.setattr(ring, "fits", lambda *_: True)
    monkeypatch.setattr(ring, "ring_experts", lambda *_, in_parts: said)
    case = inputs(1, torch.float32)
    found = found_experts(case, experts)
    assert (found is said) == is_taken
    if not is_taken:
        assert error_of(found, expected_experts(*case, values)) < 2e-6


def test_rows_that_are_to_be_invariant_go_elsewhere(monkeypatch: pytest.MonkeyPatch):
    experts, values = packed_experts("int4_128_f16", "int4_128_f16", COUNT, HIDDEN, INNER)
    case = inputs(3, torch.float32)
    said = torch.zeros(3, HIDDEN, device=DEVICE)
    monkeypatch.setattr(ring, "fits", lambda *_: True)
    monkeypatch.setattr(ring, "ring_experts", lambda *_, in_parts: said)
    assert found_experts(case, experts) is said
    exact = found_experts(case, experts, is_deterministic=True)
    assert error_of(exact, expected_experts(*case, values)) < 2e-6
    monkeypatch.setattr(choose_packed, "unpacks_experts", lambda num_pairs, *_: num_pairs > 0)
    assert error_of(found_experts(case, experts), expected_experts(*case, values)) < 2e-6


@pytest.mark.parametrize(
    "kinds",
    [("int4_128_f16", "fp8"), ("int4_32_f16", "int4_128_f16"), ("q4_k", "q6_k"), ("mxfp4", "q8_0")],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 32, 60, 128, 512])
@pytest.mark.parametrize(("count", "top_k"), [(8, 2), (128, 8)])
def test_launch_shapes_agree(kinds: tuple[str, str], num_tokens: int, count: int, top_k: int):
    gate, down = (PLANE_LAYOUTS[kind] for kind in kinds)
    shape = ring_experts_shape(
        *(num_tokens, top_k, count, 4096, 1024, gate, down), is_lone=num_tokens == 1
    )
    assert shape.gate_up.tokens == shape.down.tokens, "both walk the same blocks"
    for one, layout in ((shape.gate_up, gate), (shape.down, down)):
        assert not one.is_wide or layout.group == 128
        assert one.rows % (16 * one.num_warps) == 0
        stored = one.rows * layout.row_bytes(256) // 2 + one.tokens * 256
        assert one.stages * one.tiles * stored <= 113 << 10, "two programs fit a processor"


@pytest.mark.parametrize(("kind", "is_taken"), [("int4_64_f16", True), ("q8_0", False)])
def test_many_rows_of_narrow_groups_go_elsewhere(
    monkeypatch: pytest.MonkeyPatch, kind: str, is_taken: bool
):
    experts, values = packed_experts(kind, kind, COUNT, 64, 64)
    case = inputs(5, torch.float32, 64)
    said = torch.zeros(5, 64, device=DEVICE)
    monkeypatch.setattr(ring, "fits", lambda *_: True)
    monkeypatch.setattr(ring, "ring_experts", lambda *_, in_parts: said)
    monkeypatch.setattr(choose_packed, "RING_ROWS", 3)
    assert found_experts(case, experts) is said, "ten pairs of four experts are few"
    monkeypatch.setattr(choose_packed, "RING_ROWS", 2)
    found = found_experts(case, experts)
    assert (found is said) == is_taken
    assert is_taken or error_of(found, expected_experts(*case, values)) < 2e-6


def test_biases_are_added_once(monkeypatch: pytest.MonkeyPatch):
    experts, values = packed_experts("mxfp4", "mxfp4", COUNT, 64, 64)
    experts = with_biases(experts)
    case = inputs(3, torch.float32, 64)
    said = torch.ones(3, 64, device=DEVICE)
    monkeypatch.setattr(ring, "ring_experts", lambda *_, in_parts: said.clone())
    with monkeypatch.context() as patch:
        patch.setattr(ring, "fits", lambda *_: True)
        assert torch.equal(found_experts(case, experts, CLAMPED), said), "the ring adds them all"
    expected = expected_experts(*case, values, experts.biases, CLAMPED)
    assert error_of(found_experts(case, experts, CLAMPED), expected) < 2e-6


@on_hopper
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in KINDS),
        *((kind, torch.float16) for kind in ("int4_32_f16", "q5_k", "mxfp4")),
    ],
    ids=str,
)
def test_experts_equal_float64(kind: str, dtype: torch.dtype):
    inner = 512 if PLANE_LAYOUTS[kind].step == 256 else INNER
    experts, values = packed_experts(kind, kind, COUNT, HIDDEN, inner)
    for count in (1, 3, 20, 70, 150):
        case = inputs(count, dtype)
        x, weights, ids = case
        case = x * 0.01, weights, ids
        found = found_experts(case, experts)
        if count > 1 and hopper_fp8.fits(case[0], experts, "silu", ids.numel()):
            assert error_of(found, rounded_experts(*case, values, by_block=True)) < 2e-2
        else:
            assert error_of(found, expected_experts(*case, values)) < 8e-3


@on_hopper
@pytest.mark.parametrize("kind", ["mxfp4", "q8_0", "int4_64_f16"])
def test_biased_experts_of_half_tiles_equal_float64(kind: str):
    hidden, inner = 64 * 5, 64 * 7
    experts, values = packed_experts(kind, kind, COUNT, hidden, inner)
    experts = with_biases(experts)
    for count in (1, 3, 40, 150):
        x, weights, ids = inputs(count, torch.bfloat16, hidden)
        case = x * 0.01, weights, ids
        expected = expected_experts(*case, values, experts.biases, CLAMPED)
        assert error_of(found_experts(case, experts, CLAMPED), expected) < 8e-3


@pytest.mark.skipif(DEVICE != "cpu", reason="where a GPU runs the kernels themselves")
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize(
    ("kinds", "hidden", "inner", "count", "splits"),
    [
        (("int4_128_f16", "mxfp4"), 256, 384, 1, 2),
        (("q4_k", "q6_k"), 256, 512, 1, 1),
        (("int4_64_f16", "q4_k"), 64, 256, 2, 2),
        (("q5_k", "q3_k"), 256, 256, 3, 1),
        (("mxfp4", "mxfp4"), 320, 448, 1, 2),
        (("fp8", "int8_128"), 256, 256, 1, 1),
        (("mxfp4", "q8_0"), 128, 128, 3, 1),
    ],
    ids=["numbers", "alone", "each-alone", "together", "biased", "small-alone", "small"],
)
def test_experts_equal_float64_without_a_gpu(
    kinds: tuple[str, str], hidden: int, inner: int, count: int, splits: int, is_late: bool
):
    emulator = emulated("octavo.kernels.triton.experts.hopper.ring", is_late=is_late)
    experts, values = packed_experts(*kinds, COUNT, hidden, inner)
    if hidden % 128:
        experts = with_biases(experts)
    activation = "silu" if experts.biases is None else CLAMPED
    dtype = torch.bfloat16 if kinds in SMALL else torch.float16
    x, weights, ids = inputs(count, dtype, hidden)
    case = x * 0.01, weights, ids
    narrow = RingShape(tokens=8, rows=64, num_warps=4, stages=3, tiles=2, is_wide=False)
    shape = RingExpertsShape(
        gate_up=narrow, down=replace(narrow, tiles=1, splits=splits), is_lone=count <= 2
    )
    found = emulator.ring_experts(*case, experts, activation, shape)
    expected = expected_experts(*case, values, experts.biases, activation)
    assert error_of(found, expected) < (2e-3 if dtype is torch.float16 else 8e-3)
