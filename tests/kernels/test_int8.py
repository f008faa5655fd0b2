"""Products with activations rounded to int8: whole sums of integers, the same bits everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.formats import PACKED_FORMATS, WEIGHT_FORMATS
from octavo.kernels.cpu.library import ISAS, load_library, supported_isas, unfit_reason
from octavo.kernels.cpu.native import NativeOps
from octavo.kernels.weights import Weight
from tests.kernels.cases import assert_close, exact, floats, make_experts, make_weight

FORMATS = (
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"),
    *(name for name in PACKED_FORMATS if name.startswith("int")),
)
TOKENS = (1, 2, 3, 8, 9, 35)


@pytest.fixture(params=[name for name in ISAS if name != "avx512_bf16"])
def int8(request: pytest.FixtureRequest) -> NativeOps:
    if reason := unfit_reason():
        pytest.skip(reason)
    if request.param not in supported_isas(load_library()):
        pytest.skip(f"this CPU has no {request.param}")
    return NativeOps(2, request.param, rounds_to_int8=True)


def rounded(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8's numbers [T, blocks, 32] and the float32 scales [T, blocks] of rows."""
    blocks = x.numpy().reshape(len(x), -1, 32)
    most = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(np.isfinite(np.float32(127) / most), np.float32(127) / most, 0)
    numbers = np.rint(blocks * inverse[..., None].astype(np.float32))
    return numbers.astype(np.int8), most / np.float32(127)


def meant(x: Tensor) -> Tensor:
    """Returns what rounded rows mean, as float64."""
    numbers, scales = rounded(x)
    values = numbers.astype(np.float64) * scales.astype(np.float64)[..., None]
    return torch.from_numpy(values.reshape(len(x), -1))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_to_int8_is_the_only_loss(
    int8: NativeOps, rng: np.random.Generator, name: str
) -> None:
    weights = [make_weight(name, rows, 512, rng) for rows in (1, 48, 77)]
    whole = floats(rng, 35, 512)
    expected = torch.cat([meant(whole) @ exact(weight).T for weight in weights], 1)
    plain = torch.cat([whole.double() @ exact(weight).T for weight in weights], 1)
    for tokens in TOKENS:
        found = int8.linear(whole[:tokens], weights)
        assert_close(found, expected[:tokens])
        assert (found - plain[:tokens]).norm() < 0.03 * plain[:tokens].norm()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_0", "q6_k"])
def test_sums_are_those_of_integers(int8: NativeOps, rng: np.random.Generator, name: str) -> None:
    """With scales that are powers of two, and numbers that int8 has, nothing is rounded at all."""
    weight = make_weight(name, 50, 256, rng)
    form = weight.format
    blocks = weight.data.clone().view(50, -1, form.block_bytes)
    at = 208 if name == "q6_k" else 0
    blocks[..., at : at + 2] = torch.tensor([0.125]).half().view(torch.uint8)
    whole = replace(weight, data=blocks.view(50, -1))
    numbers = rng.integers(-127, 128, (20, 8, 32)).astype(np.float32)
    numbers[..., 7] = 127
    x = torch.from_numpy((numbers * np.float32(0.5)).reshape(20, 256))
    expected = (x.double() @ exact(whole).T).float()
    for tokens in (1, 20):
        found = int8.linear(x[:tokens], (whole,))
        scale = np.float32(63.5) / np.float32(127)
        assert scale == np.float32(0.5)
        assert torch.equal(found, expected[:tokens])


@pytest.mark.parametrize("name", FORMATS)
def test_all_instruction_sets_and_batches_have_the_same_bits(
    int8: NativeOps, rng: np.random.Generator, name: str
) -> None:
    plainest = NativeOps(1, "avx2", rounds_to_int8=True)
    weights = [make_weight(name, rows, 768, rng) for rows in (3, 45)]
    x = floats(rng, 21, 768) * torch.from_numpy(rng.uniform(0, 9, (21, 1)).astype(np.float32))
    alone = torch.cat([plainest.linear(row, weights) for row in x.split(1)])
    for cut in ([21], [1, 2, 18], [8, 13]):
        parts = [int8.linear(part, weights) for part in x.split(cut)]
        assert torch.equal(torch.cat(parts), alone)


def test_extreme_codes_and_numbers_do_not_overflow(int8: NativeOps) -> None:
    for name in FORMATS:
        form = WEIGHT_FORMATS[name]
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            data = torch.full((17, form.row_bytes(256)), byte, dtype=torch.uint8)
            weight = _with_scales(Weight(data=data, format=form, rows=17, cols=256))
            for sign in (1.0, -1.0):
                x = torch.full((3, 256), sign)
                assert_close(int8.linear(x, (weight,)), x.double() @ exact(weight).T)


def _with_scales(weight: Weight) -> Weight:
    """All of a matrix's 16-bit or 32-bit scales become 1/128."""
    form, name = weight.format, weight.format.name
    blocks = weight.data.view(weight.rows, -1, form.block_bytes)
    wide = name.startswith("int8")
    kind = torch.float32 if wide else torch.bfloat16 if name.endswith("bf16") else torch.float16
    data = torch.tensor([1 / 128], dtype=kind).view(torch.uint8)
    starts = {"q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2)}
    for at in starts.get(name, (0,)):
        blocks[..., at : at + len(data)] = data
    return weight


def test_zeros_stay_zeros_and_nan_stays_nan(int8: NativeOps, rng: np.random.Generator) -> None:
    weight = make_weight("q4_1", 20, 64, rng)
    x = floats(rng, 9, 64)
    expected = int8.linear(x, (weight,))
    x[2], x[4, 3], x[6, 40], x[7] = 0.0, float("nan"), float("inf"), 1e-42
    found = int8.linear(x, (weight,))
    assert found[2].eq(0).all()
    assert found[4].isnan().all()
    assert not found[6].isfinite().any()
    assert found[7].abs().max() < 1e-38
    others = [0, 1, 3, 5, 8]
    assert torch.equal(found[others], expected[others])


def test_experts_and_mlps_round_what_they_multiply(
    int8: NativeOps, rng: np.random.Generator
) -> None:
    exactly = NativeOps(1, int8.isa)
    x, weights = floats(rng, 40, 64), floats(rng, 40, 2)
    ids = torch.stack([torch.from_numpy(rng.permutation(3)[:2]) for _ in range(40)]).int()
    experts = make_experts(rng, "q4_1", 3, 96)
    found = int8.moe(x, weights, ids, experts, "silu")
    expected = exactly.moe(x, weights, ids, experts, "silu")
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.02 * expected.norm()
    rows = [
        int8.moe(x[t : t + 1], weights[t : t + 1], ids[t : t + 1], experts, "silu")
        for t in range(40)
    ]
    assert torch.equal(torch.cat(rows), found)
    gate, up, down = experts.gate[0], experts.up[0], experts.down[0]
    mlp = int8.gated_mlp(x, (gate, up), down, "silu")
    assert (mlp - exactly.gated_mlp(x, (gate, up), down, "silu")).norm() < 0.02 * mlp.norm()


def test_other_formats_are_multiplied_as_ever(int8: NativeOps, rng: np.random.Generator) -> None:
    weights = [make_weight(name, 53, 256, rng) for name in ("bf16", "iq4_nl", "q4_0", "f32")]
    exactly = NativeOps(1, int8.isa)
    for tokens in (1, 30):
        x = floats(rng, tokens, 256)
        found, expected = (ops.linear(x, weights) for ops in (int8, exactly))
        same = [0, 1, 3]
        for i in range(4):
            part = slice(53 * i, 53 * i + 53)
            assert torch.equal(found[:, part], expected[:, part]) == (i in same)
