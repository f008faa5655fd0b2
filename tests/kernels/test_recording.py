"""Recorded calls of native ops: run again, they do what the ops do, over the same addresses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.cpu.native import NativeOps
from octavo.kernels.ops import Ops
from octavo.kernels.weights import ExpertWeights, Weight
from tests.kernels.cases import floats, make_weight, plain_router


@pytest.fixture
def ops(native: Ops) -> NativeOps:
    assert isinstance(native, NativeOps)
    return native


def some_weights(rng: np.random.Generator, *shapes: tuple[int, int]) -> tuple[Weight, ...]:
    return tuple(make_weight("bf16", *shape, rng) for shape in shapes)


def test_a_replay_reads_new_inputs_and_writes_the_same_result(
    ops: NativeOps, rng: np.random.Generator
) -> None:
    x, norm, bias = floats(rng, 2, 64), floats(rng, 64), floats(rng, 80)
    weights, some = some_weights(rng, (48, 64), (32, 64)), some_weights(rng, (3, 64))
    gate, up, down = some_weights(rng, (96, 80), (96, 80), (64, 96))
    experts = ExpertWeights(
        gate=some_weights(rng, *3 * [(32, 64)]),
        up=some_weights(rng, *3 * [(32, 64)]),
        down=some_weights(rng, *3 * [(64, 32)]),
    )
    router, counts = plain_router(2), torch.zeros(3, dtype=torch.int64)
    embedding, ids = make_weight("f32", 9, 64, rng), torch.tensor([1, 2], dtype=torch.int32)

    def body() -> Tensor:
        y = ops.rms_norm(ops.embedding(ids, embedding), norm, 1e-5)
        y = ops.add_rms_norm(x, y, norm, 1e-5)
        y = ops.gated_mlp(ops.linear(y, weights, bias), (gate, up), down, "silu")
        topk = ops.route(ops.linear(y, some), router, counts)
        return ops.moe(y, *topk, experts, "silu")

    with torch.inference_mode():
        result, replay = ops.record(body)
        first = result.clone()
        assert replay is not None
        assert counts.sum() == 4
        for _ in range(3):
            ids.copy_(torch.from_numpy(rng.integers(0, 9, 2).astype(np.int32)))
            x.copy_(floats(rng, 2, 64))
            before = counts.clone()
            replay()
            found, counted = result.clone(), counts - before
            assert torch.equal(found, body())
            assert torch.equal(counts - before, 2 * counted)
            assert not torch.equal(found, first)


def test_what_torch_computes_in_between_is_not_recorded(
    ops: NativeOps, rng: np.random.Generator
) -> None:
    x, weights = floats(rng, 1, 64), some_weights(rng, (64, 64))
    for change in (lambda y: y * 2, lambda y: y.add_(1), lambda y: torch.cat((y, y))):
        with torch.inference_mode():
            result, replay = ops.record(lambda change=change: change(ops.linear(x, weights)))
            assert replay is None
            assert torch.equal(result, change(ops.linear(x, weights)))


def test_a_replay_names_the_op_whose_input_is_out_of_range(
    ops: NativeOps, rng: np.random.Generator
) -> None:
    embedding, ids = make_weight("f32", 9, 64, rng), torch.zeros(2, dtype=torch.int32)
    with torch.inference_mode():
        _, replay = ops.record(lambda: ops.embedding(ids, embedding))
        assert replay is not None
        ids[1] = 9
        with pytest.raises(IndexError, match=r"^embedding: "):
            replay()
        ids[1] = 8
        replay()


def test_a_body_that_raises_ends_its_recording(ops: NativeOps, rng: np.random.Generator) -> None:
    x, weights = floats(rng, 1, 64), some_weights(rng, (64, 64))

    def broken() -> Tensor:
        ops.linear(x, weights)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ops.record(broken)
    assert ops.record(lambda: ops.linear(x, weights))[1] is not None


def test_watching_does_not_import_the_compiler() -> None:
    # It takes seconds, and the first decode would wait for it.
    program = (
        "import sys, torch\n"
        "from octavo.kernels.cpu.recording import watched\n"
        "assert watched(lambda: torch.ones(2) + 1)[1]\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
