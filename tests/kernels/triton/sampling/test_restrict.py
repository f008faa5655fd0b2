"""Masks of bits and lists of biases against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.sampling import restrict  # isort: skip


def packed(allowed: NDArray[np.bool_]) -> torch.Tensor:
    """Bits of [M, V] as int32 words [M, ceil(V / 32)]."""
    width = -(-allowed.shape[1] // 32) * 32
    padded = np.zeros((len(allowed), width), np.bool_)
    padded[:, : allowed.shape[1]] = allowed
    bits = np.packbits(padded, axis=1, bitorder="little")
    return torch.from_numpy(bits.view(np.int32)).to(DEVICE)


@pytest.mark.parametrize("size", [1, 31, 32, 4097, 9000])
def test_only_ids_whose_bits_are_set_stay_possible(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal((5, size)) * 3).astype(np.float32)
    logits[2, 0] = -np.inf if size > 1 else 0
    logits[4, size // 2] = np.nan
    logits[3] = -np.inf
    places = np.array([4, 2, 0, 3], np.int32)
    allowed = rng.random((4, size)) < 0.4
    allowed[1, 0] = True
    expected = logits.copy()
    for place, bits in zip(places, allowed, strict=True):
        if np.isfinite(logits[place].max()):
            row = np.maximum(logits[place], np.float32(-1e30))
            expected[place] = np.where(bits, row, -np.inf)
    found = torch.from_numpy(logits.copy()).to(DEVICE)
    restrict.mask_logits(found, torch.from_numpy(places).to(DEVICE), packed(allowed))
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("num_biases", [1, 255, 600])
def test_biases_are_added_where_they_belong(num_biases: int) -> None:
    rng = np.random.default_rng(num_biases)
    logits = rng.standard_normal((4, 300)).astype(np.float32)
    places, ids = np.divmod(rng.permutation(4 * 300)[:num_biases].astype(np.int32), 300)
    values = (rng.standard_normal(num_biases) * 50).astype(np.float32)
    expected = logits.copy()
    expected[places, ids] += values
    found = torch.from_numpy(logits.copy()).to(DEVICE)
    given = [torch.from_numpy(one).to(DEVICE) for one in (places, ids, values.view(np.int32))]
    restrict.bias_logits(found, *given)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)
