"""What only the native back end has: a thread pool, cached descriptors, an instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from octavo.kernels.cpu import structs
from octavo.kernels.cpu.native import Descriptors, NativeOps
from octavo.kernels.ops import Ops
from tests.kernels.cases import floats, make_weight


def test_python_threads_may_call_at_once(native: Ops, rng: np.random.Generator) -> None:
    weights = [make_weight("bf16", 300, 128, rng) for _ in range(4)]
    xs = [floats(rng, tokens, 128) for tokens in (1, 3, 9, 40)]
    alone = [native.linear(x, (w,)) for x, w in zip(xs, weights, strict=True)]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(50):
            jobs = [
                executor.submit(native.linear, x, (w,)) for x, w in zip(xs, weights, strict=True)
            ]
            found = [job.result() for job in jobs]
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_more_threads_than_cores_and_many_short_jobs_end(
    native: Ops, rng: np.random.Generator
) -> None:
    weight, x = make_weight("f32", 600, 64, rng), floats(rng, 5, 64)
    expected = native.linear(x, (weight,))
    crowd = NativeOps(3 * (os.cpu_count() or 1))
    assert all(torch.equal(crowd.linear(x, (weight,)), expected) for _ in range(200))


def test_weights_bring_what_was_prepared_and_are_not_found_again(
    native: Ops, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(native, NativeOps)
    x, weights = floats(rng, 2, 64), [make_weight("f32", rows, 64, rng) for rows in (8, 8, 64)]
    ones = [native.linear(x, (weight,)) for weight in weights]
    pair = native.prepare(weights[:2])
    (down,) = native.prepare((make_weight("f32", 64, 8, rng),))
    expected = native.gated_mlp(x, weights[:2], down, "silu")
    assert not native._structs._entries
    part = pair[1].part(2, 8)  # has nothing of the whole
    assert torch.equal(native.linear(x, (part,)), ones[1][:, 2:])
    monkeypatch.setattr(structs, "FORMAT_CODES", {})  # so that none can be made
    assert torch.equal(native.linear(x, pair), torch.cat(ones[:2], dim=1))
    assert torch.equal(native.linear(x, (pair[1],)), ones[1])
    assert torch.equal(native.gated_mlp(x, pair, down, "silu"), expected)


def test_descriptors_go_with_what_they_describe() -> None:
    found, value = Descriptors(), torch.zeros(1)
    address = found.add("key", (value,), ctypes.c_int64(3))
    assert found.get("key") == address
    del value
    assert found.get("key") is None


def test_a_forked_child_computes_and_ends() -> None:
    code = """
import os, torch
from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.ops import Weight
from octavo.kernels.registry import Needs, select_ops
torch.set_num_threads(1)
ops = select_ops("auto", Needs(num_threads=2))
weight = Weight(data=torch.ones(200, 64), format=WEIGHT_FORMATS["f32"], rows=200, cols=64)
ops.linear(torch.ones(2, 64), (weight,))
child = os.fork()
result = ops.linear(torch.ones(2, 64), (weight,))
assert (result == 64).all()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, timeout=60).returncode == 0


def test_it_says_what_instructions_it_uses(native: Ops) -> None:
    assert isinstance(native, NativeOps)
    assert native.isa in ("avx2", "avx512")
