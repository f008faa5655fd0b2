"""gpt-oss in GGUF: biases, sinks and experts in MXFP4 mean what transformers says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.kernels.dequantize import dequantize_rows
from octavo.models.registry import read_spec
from octavo.weights.gguf_config import config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_source import open_gguf
from octavo.weights.names import expert_names
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.reading import read
from tests.weights.served_twins import assert_says_what_transformers_says
from tests.weights.tiny_gguf import add_value, finish, metadata_of, write_values

MXFP4 = gguf.GGMLQuantizationType.MXFP4
SIZES = {"hidden_size": 64, "intermediate_size": 32}


def written(model: TinyModel, path: Path) -> Path:
    """Writes the model as llama.cpp's converter does, experts in MXFP4; gives it their values."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, value in metadata_of(model.config).items():
        add_value(writer, f"gpt-oss.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, model.config["num_hidden_layers"])
    for name, tensor in model.reference.state_dict().items():
        if ".experts." in name:
            layer, part = name.split(".")[2], name.rpartition(".")[2]
            for gguf_name, values in _expert_tensors(part, tensor):
                kind = "bias" if part.endswith("_bias") else "weight"
                full = f"blk.{layer}.{gguf_name}.{kind}"
                if kind == "bias":
                    writer.add_tensor(full, values.numpy().copy())
                    continue
                blocks = quantize(values.numpy().copy(), MXFP4)
                writer.add_tensor(full, blocks, raw_dtype=MXFP4)
                values.copy_(torch.from_numpy(dequantize(blocks, MXFP4)))
            continue
        base = name.removesuffix(".weight").removesuffix(".bias")
        suffix = "bias" if name.endswith(".bias") else "weight"
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", tensor.numpy().copy())
    finish(writer)
    return path


def _expert_tensors(part: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields views of a parameter by the names of the file's parts, rows before columns."""
    turned = tensor if part.endswith("_bias") else tensor.transpose(1, 2)
    if part.startswith("down_proj"):
        yield "ffn_down_exps", turned
    else:
        yield "ffn_gate_exps", turned[:, ::2]
        yield "ffn_up_exps", turned[:, 1::2]


@pytest.fixture(scope="module", params=["gpt-oss", "gpt-oss-odd"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyModel, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    more = {} if request.param == "gpt-oss" else {"layer_types": None, "swiglu_alpha": 1.702}
    model = save_tiny(request.param, folder / "model", swiglu_limit=7.0, **SIZES, **more)
    return model, written(model, folder / "model.gguf")


def test_a_file_means_what_the_checkpoint_means(made: tuple[TinyModel, Path]) -> None:
    model, path = made
    found, expected = (
        read_spec(config)[0] for config in (config_of(read_gguf(path)), model.config)
    )
    assert found.norm_eps == pytest.approx(expected.norm_eps)  # float32 in the file
    assert replace(found, norm_eps=expected.norm_eps) == expected


def test_experts_biases_and_sinks_are_those_of_the_checkpoint(
    made: tuple[TinyModel, Path],
) -> None:
    model, path = made
    source, names = open_gguf(path), expert_names("gpt_oss")
    state = model.reference.state_dict()
    assert torch.equal(
        read(source, "model.layers.1.self_attn.sinks"), state["model.layers.1.self_attn.sinks"]
    )
    bias = state["model.layers.0.mlp.router.bias"]
    assert torch.equal(read(source, "model.layers.0.mlp.router.bias"), bias)
    for part, first in (("gate", 0), ("up", 1)):
        for kind, stored in (("weight", "gate_up_proj"), ("bias", "gate_up_proj_bias")):
            whole = state[f"model.layers.2.mlp.experts.{stored}"][2]
            expected = whole.T[first::2] if kind == "weight" else whole[first::2]
            name = names.expert(2, 2, part, kind=kind)
            found = dequantize_rows(source.matrix(name), slice(None)) if kind == "weight" else None
            assert torch.equal(source.vector(name) if found is None else found, expected)


def test_a_tiny_file_says_what_transformers_says_beyond_its_window(
    made: tuple[TinyModel, Path],
) -> None:
    model, path = made
    prompt = np.random.default_rng(0).integers(0, 211, 60).tolist()
    assert_says_what_transformers_says(
        *(path, model, prompt, 2e-4), device="cpu", max_model_len=128
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_gating_func": 2}, r"expert_gating_func is 2; known is 1 .* or 3"),
        ({"attention.sliding_window": None}, "attention.sliding_window is missing"),
    ],
)
def test_what_is_not_gpt_oss_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = {"expert_count": 2, "expert_used_count": 1, "attention.sliding_window": 16}
    tensors = {
        "blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32),
        "blk.0.ffn_gate_exps.weight": np.zeros((2, 32, 64), np.float32),
    }
    path = write_values(tmp_path / "model.gguf", "gpt-oss", base | values, tensors)
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(read_gguf(path))


def test_biases_of_experts_have_two_dimensions(tmp_path: Path) -> None:
    bias = {"blk.0.ffn_up_exps.bias": np.zeros(4, np.float32)}
    path = write_values(tmp_path / "model.gguf", "gpt-oss", {}, bias)
    with pytest.raises(WeightsError, match=r"ffn_up_exps.bias must be \[experts, rows\], got"):
        open_gguf(path)
