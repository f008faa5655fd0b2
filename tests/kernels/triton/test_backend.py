"""The Triton back end as a whole: what it refuses, and steps of nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import UnsupportedModelError
from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.weights import Weight
from tests.kernels.cases import floats
from tests.kernels.triton.cases import (
    make_experts,
    make_ops,
)
from tests.kernels.triton.interpreter import DEVICE


def test_block_formats_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    data = torch.zeros(8, 34, dtype=torch.uint8)
    weight = Weight(data=data, format=WEIGHT_FORMATS["q8_0"], rows=8, cols=32)
    with pytest.raises(UnsupportedModelError, match=r"q8_0 .* before they are laid out in planes"):
        make_ops().linear(floats(rng, 1, 32), (weight,))


def test_no_tokens_give_no_rows(rng: np.random.Generator) -> None:
    experts = make_experts(rng, 2, 64, 32, torch.float32)
    x, ids = floats(rng, 0, 64).to(DEVICE), torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    ops = make_ops()
    assert ops.moe(x, torch.zeros(0, 2, device=DEVICE), ids, experts, "silu").shape == (0, 64)
    assert ops.linear(x, experts.gate[:1]).shape == (0, 32)
    assert ops.rms_norm(x, torch.ones(64, device=DEVICE), 1e-5).shape == (0, 64)
