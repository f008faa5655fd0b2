"""Models whose layers have kept different numbers of experts say what transformers says of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM
from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.mlp_spec import MoESpec
from octavo.models.registry import read_spec
from tests.models.parity import BACKENDS, ops_or_skip
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.served_twins import assert_says_what_transformers_says

KEPT = (6, 4, 2)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of six experts a layer that has lost some, as compressed-tensors tells of it."""
    folder = tmp_path_factory.mktemp("pruned")
    tiny = save_tiny("qwen3-moe", folder, num_experts=6)
    for layer, count in zip(tiny.reference.model.layers, KEPT, strict=True):
        fewer = copy.deepcopy(tiny.reference.config)
        fewer.num_experts = count
        block = type(layer.mlp)(fewer).eval()
        kept = {name: tensor[:count] for name, tensor in layer.mlp.state_dict().items()}
        block.load_state_dict(kept)
        layer.mlp = block
    tiny.reference.save_pretrained(folder)
    return replace(tiny, config=told(tiny, list(KEPT)))


def told(tiny: TinyModel, counts: Any, method: str = "prune") -> dict[str, Any]:
    """Writes and returns a config.json with the experts of each layer."""
    sparsity = {"method": method, "num_experts": counts}
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "moe_sparsity_config": sparsity,
    }
    config = {**tiny.config, "quantization_config": said}
    (tiny.folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_fewer_experts_say_what_transformers_says(
    backend: str, pruned: TinyModel
) -> None:
    ops_or_skip(backend)
    assert_says_what_transformers_says(
        *(pruned.folder, pruned, list(range(3, 60)), 2e-4),
        attention_backend=backend,
        kv_cache_memory_bytes="1MiB",
    )


def test_each_layer_has_the_experts_that_it_kept(pruned: TinyModel) -> None:
    spec, _ = read_spec(pruned.config)
    counts = [layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoESpec)]
    assert counts == list(KEPT)
    assert spec.max_experts == max(KEPT)


def test_experts_that_the_config_does_not_say_are_refused(
    pruned: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to(pruned.folder / "model.safetensors")
    told(replace(pruned, folder=tmp_path), [6, 5, 2])
    with pytest.raises(WeightsError, match="weights do not match the config"):
        LLM(str(tmp_path), skip_tokenizer_init=True, num_threads=1)


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [
        ("half", "moe_sparsity_config is 'half'"),
        ({"method": "novice", "num_experts": [6, 4, 2]}, "method is 'novice'; known: prune"),
        ({"method": "prune"}, "num_experts is None; known: a list of 3"),
        ({"method": "prune", "num_experts": [6, 4]}, r"num_experts is \[6, 4\]; known: a list"),
        (
            {"method": "prune", "num_experts": [6, 4, 1]},
            r"num_experts\[2\] is 1; known: a number from 2 to 6",
        ),
        ({"method": "prune", "num_experts": [6, None, 2]}, r"num_experts\[1\] is None"),
        ({"method": "prune", "num_experts": [7, 4, 2]}, r"num_experts\[0\] is 7"),
    ],
)
def test_counts_that_cannot_be_are_refused(sparsity: Any, words: str, pruned: TinyModel) -> None:
    said = {"quant_method": "compressed-tensors", "moe_sparsity_config": sparsity}
    with pytest.raises(UnsupportedModelError, match=words):
        read_spec({**pruned.config, "quantization_config": said})


def test_dense_layers_and_groups_of_experts_are_minded(tmp_path: Path) -> None:
    config = save_tiny("deepseek-v3", tmp_path).config  # one dense layer, experts in three groups
    for counts, words in (
        ([6, 6, 6], r"num_experts\[0\] is 6; known: null: the layer is dense"),
        ([None, 4, 6], r"num_experts\[1\] is 4; known: a number from 2 to 6, a multiple of 3"),
    ):
        said = {"moe_sparsity_config": {"method": "prune", "num_experts": counts}}
        with pytest.raises(UnsupportedModelError, match=words):
            read_spec({**config, "quantization_config": said})
