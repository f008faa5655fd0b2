"""GLM-4.5 and 4.6 in GGUF: keys and tensors of `glm4moe` mean what transformers says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import UnsupportedModelError
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.registry import read_spec
from octavo.weights.gguf_config import config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_source import open_gguf
from octavo.weights.loader import check_names
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.served_twins import assert_says_what_transformers_says
from tests.weights.tiny_gguf import write_tiny_gguf, write_values

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    "glm4-moe": {},
    "glm4-moe-odd": {
        "num_nextn_predict_layers": 2,
        "head_dim": 44,
        "rope_parameters": {**YARN, "rope_theta": 10_000.0, "partial_rotary_factor": 0.69},
    },
}
"""Changes: 30 of 44 numbers are rotated, and 44 times 30 / 44 is a little less than 30."""


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyModel, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "model", **CASES[request.param])
    write_tiny_gguf(folder / "model.gguf", model)
    return model, folder / "model.gguf"


def test_a_file_means_what_the_checkpoint_means(made: tuple[TinyModel, Path]) -> None:
    model, path = made
    (found, family), (expected, _) = (
        read_spec(config) for config in (config_of(read_gguf(path)), model.config)
    )
    assert found.norm_eps == pytest.approx(expected.norm_eps)  # float32 in the file
    assert replace(found, norm_eps=expected.norm_eps) == expected
    check_names(open_gguf(path), weight_shapes(found, family), ignorable_names(found, family))


def test_a_tiny_file_says_what_transformers_says(made: tuple[TinyModel, Path]) -> None:
    model, path = made
    prompt = np.random.default_rng(0).integers(0, 211, 60).tolist()
    assert_says_what_transformers_says(
        *(path, model, prompt, 1e-4), device="cpu", max_model_len=128
    )


GIVEN: dict[str, Any] = {
    "block_count": 2,
    "nextn_predict_layers": 1,
    "rope.dimension_count": 8,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
}
TENSORS = {
    "blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32),
    "blk.0.ffn_gate_exps.weight": np.zeros((4, 32, 64), np.float32),
}


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    config = config_of(read_gguf(write_values(tmp_path / "m.gguf", "glm4moe", GIVEN, TENSORS)))
    assert config["num_hidden_layers"] == 1
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert (config["routed_scaling_factor"], config["norm_topk_prob"]) == (1.0, False)
    assert (config["first_k_dense_replace"], config["use_qk_norm"]) == (0, False)
    (rope,) = read_spec(config)[0].ropes
    assert rope.rotary_dim == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_gating_func": 1}, r"expert_gating_func is 1; known is 2 \(sigmoid\)"),
        ({"rope.dimension_count": 32}, "dimension_count is 32; known is at most the head size, 16"),
        ({"rope.dimension_count": None}, "rope.dimension_count is missing"),
        ({"expert_shared_count": 0}, "expert_shared_count is 0; known is a number of at least 1"),
        ({"nextn_predict_layers": 2}, "predict_layers is 2; known is less than block_count, 2"),
    ],
)
def test_what_is_not_glm_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_values(tmp_path / "m.gguf", "glm4moe", GIVEN | values, TENSORS)
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(read_gguf(path))
