"""Makes a Mixtral checkpoint of a dense Llama one: every expert a noisy copy of the MLP.

Called by `demo`, once. Sparse upcycling (Komatsuzaki et al., 2022) without the training: the noise
is small enough for readable text and large enough that a routing mistake shows in the logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.weights.cast import CastSource
from octavo.weights.gguf_config import config_of, generation_config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_source import open_gguf
from octavo.weights.gguf_tokenizer import tokenizer_files_from_gguf
from octavo.weights.names import expert_names

NUM_EXPERTS, TOP_K = 4, 2
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What SmolLM2's authors recommend; drawn at temperature 1 so small a model talks nonsense."""
_NOISE = 0.1
"""Of each matrix's standard deviation; 0.3 ruins the text."""
_ROUTER_STD = 0.02
_SEED = 35
"""Of 1,500 tried with 4 experts the one whose least used expert of any layer gets most (6 %) of
English text."""


def write_mixtral(
    gguf: Path, folder: Path, num_experts: int = NUM_EXPERTS
) -> Iterator[tuple[int, int]]:
    """Writes weights, configs and tokenizer files; yields (steps done, steps in all) on the way."""
    file = read_gguf(gguf)
    dense = config_of(file)
    source = CastSource(open_gguf(gguf), "float32")
    names = expert_names("mixtral")
    tensors: dict[str, Tensor] = {}
    total = len(source.names()) + 1
    for done, name in enumerate(sorted(source.names())):
        yield done, total
        if len(source.shape(name)) == 1:
            tensors[name] = source.vector(name).to(torch.bfloat16)
            continue
        matrix = source.matrix(name).data
        layer, _, part = name.removeprefix("model.layers.").partition(".mlp.")
        if not part:
            tensors[name] = matrix.to(torch.bfloat16)
            continue
        for expert in range(num_experts):
            expert_name = names.expert(layer, expert, part.removesuffix("_proj.weight"))
            noise = _normal(expert_name, matrix.shape) * (_NOISE * matrix.std())
            tensors[expert_name] = (matrix + noise).to(torch.bfloat16)
    for layer in range(dense["num_hidden_layers"]):
        name = names.router(layer)
        router = _normal(name, torch.Size((num_experts, dense["hidden_size"]))) * _ROUTER_STD
        tensors[name] = router.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _mixtral_config(dense, num_experts))
    _write_json(folder / "generation_config.json", generation_config_of(file) | _SAMPLING)
    for file_name, text in tokenizer_files_from_gguf(gguf).items():
        (folder / file_name).write_text(text, encoding="utf-8")
    yield total, total


def _normal(name: str, shape: torch.Size) -> Tensor:
    """Returns standard normal numbers that depend on the name alone."""
    digest = hashlib.sha256(f"{_SEED}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator)


def _mixtral_config(dense: dict[str, Any], num_experts: int) -> dict[str, Any]:
    kept = {key: value for key, value in dense.items() if key != "attention_bias"}
    return {
        **kept,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": TOP_K,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
