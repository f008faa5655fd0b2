"""Norms, the embedding and the gated addition against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.cases import floats
from tests.kernels.triton.cases import TOLERANCES, assert_near, make_ops, make_stack
from tests.kernels.triton.interpreter import DEVICE


@pytest.mark.parametrize("has_gate", [True, False])
def test_add_gated_adds_in_place(rng: np.random.Generator, has_gate: bool) -> None:
    out, x, gate = (floats(rng, 5, n).to(DEVICE) for n in (1100, 1100, 1))
    expected = out.double() + x.double() * (torch.sigmoid(gate.double()) if has_gate else 1)
    make_ops().add_gated(out, x, gate if has_gate else None)
    assert_near(out, expected, 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("size", [1, 5, 64, 577, 2048])
def test_rms_norm_equals_float64(rng: np.random.Generator, size: int, dtype: torch.dtype) -> None:
    x, weight = floats(rng, 3, size).to(DEVICE, dtype), floats(rng, size).to(DEVICE, dtype)
    residual = floats(rng, 3, size).to(DEVICE, dtype)
    ops, kept = make_ops(), x.clone()
    for found, y in (
        (ops.rms_norm(x, weight, 1e-5), x.double()),
        (ops.add_rms_norm(x, residual, weight, 1e-5), residual.double()),
    ):
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        assert_near(found, y * scale * weight.double(), TOLERANCES[dtype])
        assert torch.equal(x, kept)


def test_add_rms_norm_adds_in_place(rng: np.random.Generator) -> None:
    x, residual = floats(rng, 70, 77).to(DEVICE), floats(rng, 70, 77).to(DEVICE)
    total = x + residual
    make_ops().add_rms_norm(x, residual, floats(rng, 77).to(DEVICE), 1e-6)
    assert torch.equal(residual, total)


def test_embedding_returns_the_rows_and_nan_for_unknown_ids(rng: np.random.Generator) -> None:
    table = make_stack(rng, 1, 40, 1100, torch.bfloat16)[0]
    ids = torch.tensor([39, 0, 7, 7, 40, -1], dtype=torch.int32, device=DEVICE)
    found = make_ops().embedding(ids, table)
    assert torch.equal(found[:4], table.data[ids[:4].long()].float())
    assert found[4:].isnan().all()
