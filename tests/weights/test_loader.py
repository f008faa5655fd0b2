"""Which source a model gets, and the account of its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.weights.cast import CastSource
from octavo.weights.dummy import DummySource
from octavo.weights.hub import ModelFiles, ModelKind, resolve_model
from octavo.weights.loader import check_names, open_source
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import MappedSource
from tests.models.tiny import save_tiny
from tests.weights.tiny_gguf import write_tiny_gguf

SHAPES = {"m.weight": (4, 6), "norm.weight": (6,)}


def config_only(config: dict[str, Any]) -> ModelFiles:
    kind: ModelKind = "config"
    return ModelFiles(
        name="m", kind=kind, path=Path(), config=config, generation_config={}, identity="0"
    )


def test_safetensors_and_gguf_of_one_model_give_the_same_tensors(tmp_path: Path):
    tiny = save_tiny("mixtral", tmp_path)
    write_tiny_gguf(tmp_path / "model.gguf", tiny)
    folder = open_source(resolve_model(str(tmp_path)), "auto", {}, 0)
    file = open_source(resolve_model(str(tmp_path / "model.gguf")), "auto", {}, 0)
    assert isinstance(folder, MappedSource)
    assert isinstance(file, MappedSource)
    check_names(file, {name: folder.shape(name) for name in folder.names()})


def test_a_dtype_makes_the_source_a_cast(tmp_path: Path):
    save_tiny("llama", tmp_path)
    source = open_source(resolve_model(str(tmp_path)), "bfloat16", {}, 0)
    assert isinstance(source, CastSource)
    assert source.matrix("lm_head.weight").data.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"dtype": "float16"}, "auto", torch.float16),
        ({"torch_dtype": "float32"}, "auto", torch.float32),
        ({}, "auto", torch.bfloat16),
        ({"dtype": "float16"}, "float32", torch.float32),
    ],
)
def test_dummy_weights_have_the_dtype_of_the_option_or_of_the_config(
    config: dict[str, Any], dtype: str, expected: torch.dtype
):
    source = open_source(config_only(config), dtype, SHAPES, 5)
    assert isinstance(source, DummySource)
    assert source.matrix("m.weight").data.dtype == expected


def test_an_unknown_dtype_in_the_config_is_refused():
    with pytest.raises(UnsupportedModelError, match="dtype 'float8'; known are float32"):
        open_source(config_only({"dtype": "float8"}), "auto", SHAPES, 0)


def test_names_that_match_pass():
    check_names(DummySource(SHAPES, "float32", 0), SHAPES)


def test_every_kind_of_mismatch_is_told_at_once():
    source = DummySource({"m.weight": (4, 5), "extra": (1,)}, "float32", 0)
    with pytest.raises(WeightsError) as caught:
        check_names(source, SHAPES)
    message = str(caught.value)
    assert "1 missing: norm.weight" in message
    assert "1 not known to this model: extra" in message
    assert "m.weight has shape [4, 5], expected [4, 6]" in message


def test_a_long_list_of_names_is_cut_and_counted():
    source = DummySource({}, "float32", 0)
    expected = {f"layers.{n}.weight": (1, 1) for n in range(9)}
    with pytest.raises(WeightsError, match=r"9 missing: layers\.0\.weight, .* and 4 more"):
        check_names(source, expected)


def test_a_bias_that_the_model_has_not_may_be_there_if_it_is_zero(tmp_path: Path):
    for bias in (torch.zeros(4), torch.tensor([0.0, 0.5])):
        save_file({"m.weight": torch.ones(4, 6), "m.bias": bias}, tmp_path / "model.safetensors")
        source = open_safetensors(tmp_path, "llama")
        if bias.any():
            with pytest.raises(WeightsError, match=r"1 not known to this model: m\.bias"):
                check_names(source, {"m.weight": (4, 6)})
        else:
            check_names(source, {"m.weight": (4, 6)})


def test_rotary_buffers_and_ignorable_names_may_be_there():
    extra = {"model.layers.3.self_attn.rotary_emb.inv_freq": (8,), "lm_head.weight": (9, 6)}
    source = DummySource({**SHAPES, **extra}, "float32", 0)
    check_names(source, SHAPES, ignorable=("lm_head.weight",))
    with pytest.raises(WeightsError, match=r"1 not known to this model: lm_head\.weight"):
        check_names(source, SHAPES)
