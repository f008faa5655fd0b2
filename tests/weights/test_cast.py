"""Weights in another number format than the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.weights.cast import CastSource
from octavo.weights.large_pages import PIECE_BYTES, LargePages
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


def test_memory_for_weights_is_given_out_once_and_goes_with_its_last_tensor():
    memory = LargePages()
    shapes = [(3, 5), (0, 4), (1000, 1000), (PIECE_BYTES // 4 - 9,), (PIECE_BYTES + 1,), (7,)]
    tensors = [memory.empty(shape, torch.float32) for shape in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert (tensor == number).all()
        assert tensor.data_ptr() % 64 == 0
    del tensors, tensor
    before = anonymous_bytes()
    for _ in range(20):
        memory.empty((PIECE_BYTES // 4,), torch.float32).fill_(1)
    assert anonymous_bytes() - before < 3 * PIECE_BYTES


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
