"""Models that also see: their text part is served, whichever way a checkpoint names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from octavo.errors import UnsupportedModelError
from octavo.models.registry import read_spec
from tests.models.parity import assert_parity, drive, load_or_skip, ops_or_skip, prompts
from tests.models.tiny import TinyModel

TEXT: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CASES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 17, "sliding_window_pattern": 2},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "attention_chunk_size": 24,
        },
        "vision_config": {
            **VISION,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
}


def save(model_type: str, folder: Path) -> TinyModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CASES[model_type])
    config._attn_implementation = config._experts_implementation = "eager"
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    # transformers' Llama 4 wants an image to speak of; its text part is a whole model
    reference: Any = model.language_model if model_type == "llama4" else model
    return TinyModel(reference=reference, folder=folder, config=saved)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("model_type", CASES)
def test_the_text_part_equals_transformers(model_type: str, is_old: bool, tmp_path: Path) -> None:
    tiny = save(model_type, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any("vision" in name for name in names)
    if is_old != any(name.startswith("language_model.model.") for name in names):
        old, new = "language_model.model.", "model.language_model."
        before, after = (new, old) if is_old else (old, new)
        renamed = {name.replace(before, after): tensor for name, tensor in names.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    decoder = load_or_skip(tiny, ops_or_skip("reference"), 256)
    with drive(decoder) as driver:
        sequence = driver.add(prompts(decoder.spec.vocab_size)[0])
        driver.step([(sequence, sequence.prompt_len)])
        driver.decode([sequence], 3)
    assert_parity(tiny, sequence)


@pytest.mark.parametrize("model_type", CASES)
def test_what_the_text_config_asks_for_is_refused_by_its_place(
    model_type: str, tmp_path: Path
) -> None:
    config = dict(save(model_type, tmp_path).config)
    text = {**config["text_config"], "num_attention_heads": "6"}
    with pytest.raises(UnsupportedModelError, match="text_config: num_attention_heads is '6'"):
        read_spec({**config, "text_config": text})
    with pytest.raises(UnsupportedModelError, match="text_config is 3"):
        read_spec({**config, "text_config": 3})
