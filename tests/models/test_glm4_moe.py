"""GLM-4.5 and 4.6 as they are published: FP8 in both ways, with layers that predict further."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, SamplingParams
from tests.models.tiny import save_tiny
from tests.weights.packing import Written, compressed, fp8
from tests.weights.published_cases import named

CHANNEL: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
KINDS: dict[str, tuple[Callable[[np.random.Generator, int, int], Written], dict[str, Any]]] = {
    "compressed-tensors": (
        lambda r, n, k: compressed(r, n, k, "float-quantized", **CHANNEL),
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**CHANNEL, "symmetric": True, "dynamic": False},
                    "input_activations": {**CHANNEL, "strategy": "token", "dynamic": True},
                }
            },
            "ignore": ["lm_head", "model.layers.3.eh_proj"],
        },
    ),
    "blocks": (
        lambda r, n, k: fp8(r, n, k, (128, 128), torch.float32),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
PREDICTOR = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_fp8_says_what_its_numbers_say(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make, quantized = KINDS[kind]
    tiny = save_tiny("glm4-moe", tmp_path / "made", **SIZES)
    rng, packed, plain = np.random.default_rng(0), {}, {}
    for name, tensor in load_file(tmp_path / "made" / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            packed[name] = plain[name] = tensor
            continue
        made = make(rng, *tensor.shape)
        packed |= named(made, name.removesuffix(".weight"))
        plain[name] = made.values
    last = {name: tensor for name, tensor in packed.items() if name.startswith("model.layers.2.")}
    packed |= {name.replace(".2.", ".3.", 1): tensor.clone() for name, tensor in last.items()}
    packed |= {f"model.layers.3.{name}.weight": torch.ones(64) for name in PREDICTOR}
    said = []
    for name, weights, more in (
        ("packed", packed, {"quantization_config": quantized}),
        ("plain", plain, {}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {key: tensor.contiguous() for key, tensor in weights.items()}, folder / "m.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({**tiny.config, **more}))
        llm = LLM(str(folder), device="cpu", skip_tokenizer_init=True, num_threads=1)
        with contextlib.closing(llm):
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            prompts = [list(range(3, 40)), [7, 9]]
            said.append([one.outputs[0].token_ids for one in llm.generate(prompts, params)])
    assert said[0] == said[1]
