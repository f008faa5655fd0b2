"""Weights in another number format than the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.weights.cast import CastSource
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import DTYPE_FORMATS, NUMBER_DTYPES
from tests.weights.reading import anonymous_bytes


@pytest.mark.parametrize("stored", NUMBER_DTYPES.values())
@pytest.mark.parametrize("dtype", DTYPE_FORMATS)
def test_numbers_are_rounded_as_torch_does(stored: torch.dtype, dtype: str, tmp_path: Path):
    tensors = {"m": torch.randn(3, 5).to(stored), "v": torch.randn(5).to(stored)}
    save_file(tensors, tmp_path / "model.safetensors")
    cast = CastSource(open_safetensors(tmp_path, "llama"), dtype)
    wanted = NUMBER_DTYPES[DTYPE_FORMATS[dtype]]
    weight = cast.matrix("m")
    assert weight.format.name == DTYPE_FORMATS[dtype]
    assert torch.equal(weight.data, tensors["m"].to(wanted))
    assert cast.vector("v").dtype == torch.float32
    assert cast.nbytes == 20 * wanted.itemsize
    assert (cast.names(), cast.shape("m")) == ({"m", "v"}, (3, 5))


def test_casting_holds_one_tensor_at_a_time(tmp_path: Path):
    size = 16 * 2**20
    tensors = {str(n): torch.zeros(1024, size // 2048, dtype=torch.bfloat16) for n in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    cast = CastSource(open_safetensors(tmp_path, "llama"), "float32")
    before = anonymous_bytes()
    for name in cast.names():
        assert cast.matrix(name).data.sum() == 0
    assert anonymous_bytes() - before < 3 * size
