"""Writes the tiny models of `tests.models.tiny` as GGUF files, as llama.cpp's converter does.

Names come from gguf's own tables, so that a mistake in ours shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.models.tiny import TinyModel

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
}
Arrays = dict[str, NDArray[Any]]
_EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}


def write_tiny_gguf(path: Path, tiny: TinyModel, *, layout: str = "stacked") -> Arrays:
    """Writes the model with experts `stacked`, `split` or `fused` (gate and up in one tensor).

    Returns the weights under the names of the safetensors checkpoint.
    """
    weights = load_file(tiny.folder / "model.safetensors")
    architecture = ARCHITECTURES[tiny.config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata_of(tiny.config).items():
        add_value(writer, f"{architecture}.{key}", value)
    for name, array in _gguf_tensors(architecture, tiny.config, weights, layout).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    finish(writer)
    return weights


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys, without the architecture's prefix, that a config.json gives."""
    heads = config["num_attention_heads"]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        **_rope_of(config["rope_parameters"]),
        "attention.sliding_window": config.get("sliding_window"),
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "expert_count": config.get("num_experts") or config.get("num_local_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
    }
    if config["model_type"] == "glm4_moe":
        values.update(_glm_of(config, values["attention.key_length"]))
    return {key: value for key, value in values.items() if value is not None}


def _glm_of(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """What GLM's files say besides, which count the layers that predict further with the others."""
    predictors = config["num_nextn_predict_layers"]
    return {
        "block_count": config["num_hidden_layers"] + predictors,
        "nextn_predict_layers": predictors,
        "rope.dimension_count": int(head_dim * config["rope_parameters"]["partial_rotary_factor"]),
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": int(config["norm_topk_prob"]),
        "leading_dense_block_count": config["first_k_dense_replace"],
    }


def _rope_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter keeps: of Gemma 3 the rotation of the full layers alone."""
    parameters = parameters.get("full_attention", parameters)
    values: dict[str, Any] = {"rope.freq_base": float(parameters["rope_theta"])}
    if parameters["rope_type"] == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(parameters["factor"])
        original = parameters["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    return values


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(array: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Row order of llama.cpp's converter: the two halves of each head alternate."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _gguf_tensors(
    architecture: str, config: Mapping[str, Any], weights: Arrays, layout: str
) -> Arrays:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    # Dense layers among MoE layers: the tables of those families lack them.
    dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors: Arrays = {}
    experts: dict[tuple[str, str], list[NDArray[Any]]] = {}
    for name, array in sorted(weights.items()):
        if match := _EXPERT.fullmatch(name):
            part = _PARTS.get(match[3], match[3].removesuffix("_proj"))
            experts.setdefault((match[1], part), []).append(array)
            if layout == "split":
                tensors[f"blk.{match[1]}.ffn_{part}.{match[2]}.weight"] = array
            continue
        projection = re.search(r"self_attn\.([qk])_proj\.", name)
        if architecture == "llama" and projection:
            array = interleave(array, heads[projection[1]])
        if name.endswith("shared_expert_gate.weight"):
            array = array[0]
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        base, _, suffix = name.rpartition(".")
        if suffix == "e_score_correction_bias":
            base, suffix = name.removesuffix("_bias"), "bias"
        tensors[f"{names.get_name(base) or dense.get_name(base)}.{suffix}"] = array
    stacked = {key: np.stack(arrays) for key, arrays in experts.items()}
    if layout == "stacked":
        for (layer, part), array in stacked.items():
            tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = array
    elif layout == "fused":
        for layer in sorted({layer for layer, _ in stacked}):
            both = np.concatenate([stacked[layer, "gate"], stacked[layer, "up"]], axis=1)
            tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = both
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = stacked[layer, "down"]
    if architecture == "glm4moe":
        tensors.update(_predictors(config, tensors))
    return tensors


def _predictors(config: Mapping[str, Any], tensors: Arrays) -> Arrays:
    """The layers behind the last, which have its tensors and some of their own."""
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    last = f"blk.{count - 1}."
    own = {kind: name for kind, name in gguf.TENSOR_NAMES.items() if kind.name.startswith("NEXTN_")}
    found: Arrays = {}
    for layer in range(count, count + config["num_nextn_predict_layers"]):
        alike = {name: array for name, array in tensors.items() if name.startswith(last)}
        for name, array in alike.items():
            found[name.replace(last, f"blk.{layer}.")] = array + 1
        for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GLM4_MOE]:
            if kind in own:
                found[own[kind].format(bid=layer) + ".weight"] = np.ones(hidden, np.float32)
    return found


BASE: dict[str, Any] = {
    "embedding_length": 64,
    "block_count": 1,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 128,
    "feed_forward_length": 32,
}


def write_values(
    path: Path, architecture: str, values: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Path:
    """Writes a file with BASE, changed by `values` (None leaves a key out)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**BASE, **values}.items():
        if value is not None:
            name = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
            add_value(writer, name, value)
    tensors = {"token_embd.weight": np.zeros((9, 64), np.float32), **tensors}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def write_quantised_gguf(
    path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0
) -> Path:
    """Writes a header that says Llama, and matrices of zeros in Q8_0, or another format."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    width, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    blocks = np.zeros((64, size), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
