"""Random weights."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import WeightsError
from octavo.weights.dummy import DummySource
from octavo.weights.source import DTYPE_FORMATS, NUMBER_DTYPES

SHAPES = {"a.weight": (300, 700), "b.weight": (300, 700), "norm.weight": (7,), "q.bias": (7,)}
STD = 1e-3 / 3**0.5


@pytest.mark.parametrize("dtype", DTYPE_FORMATS)
def test_matrices_are_even_norms_one_and_biases_zero(dtype: str):
    source = DummySource(SHAPES, dtype, seed=3)
    weight = source.matrix("a.weight")
    assert weight.data.dtype == NUMBER_DTYPES[DTYPE_FORMATS[dtype]]
    assert weight.format.name == DTYPE_FORMATS[dtype]
    assert weight.data.float().std() == pytest.approx(STD, rel=0.02)
    assert weight.data.float().abs().max() == pytest.approx(1e-3, rel=1e-2)
    assert abs(weight.data.float().mean()) < 1e-5
    assert torch.equal(source.vector("norm.weight"), torch.ones(7))
    assert torch.equal(source.vector("q.bias"), torch.zeros(7))
    assert source.nbytes == (2 * 210_000 + 14) * weight.data.itemsize


def test_weights_depend_on_the_name_and_the_seed_alone():
    first, again, other = (DummySource(SHAPES, "float32", seed=seed) for seed in (1, 1, 2))
    a = first.matrix("a.weight").data
    assert torch.equal(a, again.matrix("a.weight").data)
    assert torch.equal(
        a, DummySource({"a.weight": (300, 700)}, "float32", 1).matrix("a.weight").data
    )
    assert not torch.equal(a, other.matrix("a.weight").data)
    assert not torch.equal(a, first.matrix("b.weight").data)


def test_a_matrix_longer_than_the_noise_is_filled_to_its_end():
    data = DummySource({"m": (3000, 3000)}, "bfloat16", seed=0).matrix("m").data.float()
    assert data[-1].std() == pytest.approx(STD, rel=0.1)
    assert not torch.equal(data[0], data[1])


def test_the_embedding_outweighs_what_layers_add():
    name = "model.embed_tokens.weight"
    data = DummySource({name: (300, 700)}, "float32", seed=0).matrix(name).data
    assert data.std() == pytest.approx(10 * STD, rel=0.02)


def test_an_unknown_name_is_refused():
    with pytest.raises(WeightsError, match="tensor c is missing"):
        DummySource(SHAPES, "float32", seed=0).matrix("c")
