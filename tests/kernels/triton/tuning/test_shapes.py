"""Tuned launch shapes: where they are kept, when they count, and that bits stay."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.product.shapes import product_shape, rows_shape  # isort: skip
from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.triton.backend import TritonOps
from octavo.kernels.triton.experts.shapes import ExpertsShape, experts_shape, pairs_shape
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.tuning import shapes as tuned_shapes
from octavo.kernels.triton.tuning.shapes import (
    Shapes,
    key_of,
    read_shapes,
    save_shape,
    shapes_path,
)
from octavo.kernels.triton.tuning.tune import Tuner, neighbours, parts_of
from octavo.kernels.weights import Weight

HALF = torch.float16
MOE = replace(experts_shape(32, 8, 128, 768, can_tma=False), block_p=32)
SHAPES = {
    key_of("moe", HALF, 32, 8, 128, 768, 2048): MOE,
    key_of("pairs", HALF, 1, 8, 128, 768, 2048): pairs_shape(2048, 768, 8),
    key_of("product", HALF, 32, 48, 64): replace(
        product_shape(32, 48, can_tma=False), block_n=32, num_warps=2
    ),
    key_of("rows", HALF, 1, 48, 64): replace(rows_shape(48, 64), block_n=2),
}


def test_shapes_are_read_as_they_were_saved_and_added_to_what_is_there(tmp_path: Path) -> None:
    path = shapes_path(tmp_path / "new", torch.device(DEVICE))
    assert read_shapes(path) == Shapes()
    for key, shape in SHAPES.items():
        save_shape(path, key, shape)
    assert read_shapes(path).tuned == SHAPES
    save_shape(path, next(iter(SHAPES)), None)
    assert read_shapes(path).tuned == dict(list(SHAPES.items())[1:])
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "entry",
    [
        {"moe torch.float16 32 8 128 768 2048": {"block_p": 16}},
        {"rows torch.float16 1 48 64": {"block_n": "x", "block_k": 8, "num_warps": 4}},
        {"rows torch.float16 1 48 64": {"block_n": 3, "block_k": 8, "num_warps": 4}},
        {"rows torch.float16 1 48 64": {"block_n": 0, "block_k": 8, "num_warps": 4}},
        {"rows torch.float16 1 48 sixty": {"block_n": 1, "block_k": 8, "num_warps": 4}},
        {"attention torch.float16 1": {}},
        {"": None},
    ],
)
def test_an_alien_entry_is_left_out_and_said_for_debugging_only(
    tmp_path: Path, entry: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    key = key_of("rows", HALF, 1, 8, 8)
    path = tmp_path / "shapes.json"
    save_shape(path, key, rows_shape(8, 8))
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with caplog.at_level(logging.DEBUG):
        assert set(read_shapes(path).tuned) == {key}
    assert [r.levelname for r in caplog.records if "ignored" in r.message] == ["DEBUG"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0"])
def test_a_broken_file_is_no_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text)
    assert read_shapes(path) == Shapes()
    save_shape(path, *next(iter(SHAPES.items())))
    assert len(read_shapes(path).tuned) == 1


def test_a_shape_serves_the_tokens_from_the_last_power_of_two_to_its_own() -> None:
    shapes, weight = Shapes(tuned=SHAPES), torch.empty(48, 64, dtype=HALF)
    tuned = SHAPES[key_of("product", HALF, 32, 48, 64)]
    for num_tokens in (17, 24, 32):
        assert shapes.product(torch.empty(num_tokens, 64, dtype=HALF), weight) is tuned
    for num_tokens in (16, 33):
        heuristic = product_shape(num_tokens, 48, can_tma=False)
        assert shapes.product(torch.empty(num_tokens, 64, dtype=HALF), weight) == heuristic
    floats = shapes.product(torch.empty(32, 64), weight.float())
    assert floats == product_shape(32, 48, can_tma=False).of_floats()


@pytest.mark.parametrize(
    ("cols", "dtype", "is_tma"),
    [(64, HALF, True), (23, HALF, False), (24, HALF, True), (18, torch.float32, False)],
)
def test_rows_that_begin_anywhere_do_not_go_through_the_memory_engine(
    cols: int, dtype: torch.dtype, is_tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_shapes, "is_hopper", lambda device: True)
    x, down = torch.empty(1024, 64, dtype=dtype), torch.empty(2, 64, cols, dtype=dtype)
    gate = torch.empty(2, cols, 64, dtype=dtype)
    experts = StackedExperts(gate_EFM=gate, up_EFM=gate, down_EMF=down)
    shape = Shapes().experts(x, 2, experts)
    assert (shape.gate_up.tma, shape.down.tma) == (is_tma, is_tma)
    weight = torch.empty(8192, cols, dtype=dtype)
    assert Shapes().product(torch.empty(1024, cols, dtype=dtype), weight).tma == is_tma


def test_ops_multiply_as_tuned_with_the_same_bits(rng: np.random.Generator) -> None:
    data = torch.from_numpy(rng.standard_normal((48, 64))).to(DEVICE, HALF)
    weight = Weight(data=data, format=WEIGHT_FORMATS["f16"], rows=48, cols=64)
    x = torch.from_numpy(rng.standard_normal((20, 64))).to(DEVICE, HALF)
    plain, tuned = (
        TritonOps(1, is_deterministic=False, shapes=p) for p in (None, Shapes(tuned=SHAPES))
    )
    assert torch.equal(plain.linear(x, (weight,)), tuned.linear(x, (weight,)))
    torch.testing.assert_close(plain.linear(x[:1], (weight,)), tuned.linear(x[:1], (weight,)))


def test_neighbours_differ_in_one_number_and_keep_to_the_limits() -> None:
    shape = experts_shape(32, 8, 128, 768, can_tma=True)
    assert parts_of(shape) == ["gate_up", "down", ""]
    found = [other for part in parts_of(shape) for other in neighbours(shape, part)]
    assert len(set(found)) == len(found)
    for other in found:
        assert isinstance(other, ExpertsShape)
        parts = [(getattr(shape, p), getattr(other, p)) for p in ("block_p", "gate_up", "down")]
        assert sum(a != b for a, b in parts) == 1
        assert other.block_p >= 16


def test_a_candidate_with_other_bits_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(DEVICE, "float16", is_deterministic=True, measure=lambda run: 1.0, num_threads=1)
    monkeypatch.setattr("octavo.kernels.triton.tuning.tune.MAX_SETS", 1)
    case = tuner.dense(4, 16, 64)
    monkeypatch.setattr(tuner, "dense", lambda *sizes: replace(case, runs=[one_off]))
    calls = iter(range(1000))

    def one_off(shape: object) -> torch.Tensor:
        return torch.full((4, 16), float(next(calls)))

    found = tuner.tune(("dense", 4, (16, 64)), lambda: False)
    assert found.fates == {"have other bits": len(list(neighbours(case.shape, "")))}
    assert found.shape is None
