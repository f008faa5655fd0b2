"""Makes a Hugging Face config out of a GGUF file's metadata and tensor shapes. No torch.

Called by `hub`, so that the models read one kind of config. Refuses what it cannot express instead
of leaving it out. Keys: gguf's constants and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.weights.gguf_architecture import GROUPED_TYPES, LATENT_TYPES, architecture_of
from octavo.weights.gguf_experts import experts_config
from octavo.weights.gguf_file import GGUFFile
from octavo.weights.gguf_glm import glm_attention_config
from octavo.weights.gguf_grouped import grouped_experts_config, num_layers
from octavo.weights.gguf_latent import latent_attention_config, yarn_sharpness
from octavo.weights.gguf_reader import Reader
from octavo.weights.gguf_specials import end_ids, special_ids

_MOST_LAYERS = 10_000
ROPE_FACTORS = "rope_freqs.weight"
_READ = {
    "gemma3_text": ("final_logit_softcapping",),
    "olmoe": ("attention.clamp_kqv",),
    **dict.fromkeys(GROUPED_TYPES, ("expert_group_count", "nextn_predict_layers")),
}
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_group_count": (0, 1),
    "nextn_predict_layers": (0,),
}
"""What changes a model, and is not read: the values that change nothing. Families that do read one
are in _READ."""


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Returns what config.json would say of the model. Raises UnsupportedModelError."""
    architecture = architecture_of(file)
    reader = Reader(file)
    if reader.size("block_count") > _MOST_LAYERS:  # each is gone through
        raise reader.refuse("block_count", f"at most {_MOST_LAYERS}")
    num_heads = reader.size("attention.head_count")
    hidden_size = reader.size("embedding_length")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", num_heads),
        "head_dim": reader.integer("attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": reader.number("rope.freq_base", 10_000.0),
        "rope_scaling": None,
        "max_position_embeddings": reader.integer("context_length"),
        "vocab_size": reader.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        **generation_config_of(file),
    }
    # MoE files may leave it out: the experts' own size comes from their tensors.
    if reader.value("feed_forward_length") is not None or not reader.integer("expert_count", 0):
        config["intermediate_size"] = reader.integer("feed_forward_length")
    _refuse_unread(reader, architecture.model_type)
    if architecture.model_type in LATENT_TYPES:
        config.update(latent_attention_config(reader))
    elif architecture.model_type == "glm4_moe":
        config.update(glm_attention_config(reader, config["head_dim"]))
    else:
        _refuse_partial_heads(reader, config["head_dim"])
    config["rope_scaling"] = _rope_scaling(reader, config)
    if architecture.model_type in ("mistral", "mixtral"):
        config["sliding_window"] = reader.integer("attention.sliding_window", 0) or None
    if architecture.model_type in GROUPED_TYPES:
        config["num_hidden_layers"] = num_layers(reader)
        config.update(grouped_experts_config(reader, architecture))
    elif reader.integer("expert_count", 0):
        config.update(experts_config(reader, architecture))
    if architecture.model_type == "gemma3_text":
        config.update(_gemma3(reader, config["head_dim"]))
        del config["hidden_act"]
    if architecture.model_type == "gpt_oss":
        config.update(_gpt_oss(reader, config))
    return config


def generation_config_of(file: GGUFFile) -> dict[str, Any]:
    """Returns the ids that begin and end a text, as far as the file has them.

    A chat model's turn may end with another id than its text: all of them end a sequence.
    """
    found: dict[str, Any] = {}
    bos, ends = special_ids(file.metadata).get("bos_token"), end_ids(file.metadata)
    if bos is not None:
        found["bos_token_id"] = bos
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


def _refuse_unread(reader: Reader, model_type: str) -> None:
    for key in _NEUTRAL.keys() - _READ.get(model_type, ()):
        value, neutral = reader.value(key), _NEUTRAL[key]
        if value is not None and value not in neutral:
            raise reader.refuse(key, " or ".join(map(str, neutral)))


def _refuse_partial_heads(reader: Reader, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(key, head_dim) != head_dim:
            raise reader.refuse(key, f"the head size, {head_dim}")


def _rope_scaling(reader: Reader, config: dict[str, Any]) -> dict[str, Any] | None:
    # A factor without a type is linear; files of 2023 have it under its old name.
    kind = reader.value("rope.scaling.type") or "linear"
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 0.0)) or 1.0
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if reader.number(f"rope.scaling.{key}", 1.0) != 1.0:
                raise reader.refuse(f"rope.scaling.{key}", "1.0")
        original = reader.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
            **(yarn_sharpness(reader) if config["model_type"] in LATENT_TYPES else {}),
        }
    if kind not in ("linear", "none"):
        raise reader.refuse("rope.scaling.type", "none, linear, yarn")
    if ROPE_FACTORS in reader.file.tensors:
        return _llama3_scaling(reader.file, config["rope_theta"], config["head_dim"])
    return None


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the llama3 scaling that gives the file's factors, which are all that it keeps.

    The files of Llama 3.1 to 3.3 hold one divisor per frequency. Only `factor` differs between
    them; whatever the other three values do not explain is refused.
    """
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.format.name != "f32":
        raise UnsupportedModelError(
            f"{file.path}: {ROPE_FACTORS} is in {tensor.format.name}; known is f32"
        )
    with tensor.path.open("rb") as data:
        data.seek(tensor.start)
        stored = struct.unpack(f"<{tensor.shape[0]}f", data.read(4 * tensor.shape[0]))
    factor, low, high, original = max(stored), 1.0, 4.0, 8192
    if factor == min(stored) == 1.0:
        return None
    for index, given in enumerate(stored):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        if not math.isclose(given, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            raise UnsupportedModelError(
                f"{file.path}: {ROPE_FACTORS} holds {given:g} at {index}, which is not the llama3 "
                f"scaling with factor {factor:g}, low_freq_factor 1, high_freq_factor 4 and 8192 "
                "positions; use the safetensors checkpoint instead"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _gemma3(reader: Reader, head_dim: int) -> dict[str, Any]:
    """Returns what is Gemma 3's own. Most files leave out the pattern of layers and the windows'
    rotation, which are the same for all sizes, and how scores are scaled, which is not."""
    wide_scale = reader.integer("embedding_length") // reader.integer("attention.head_count")
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": reader.integer("attention.sliding_window"),
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10_000.0),
        # As llama.cpp tells them apart: the 27B alone, of 62 layers, scales by its width.
        "query_pre_attn_scalar": wide_scale if reader.integer("block_count") == 62 else head_dim,
        "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
    }
    pattern = reader.value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        found["layer_types"] = [kinds[bool(is_sliding)] for is_sliding in pattern]
    elif pattern is not None:
        found["sliding_window_pattern"] = reader.integer("attention.sliding_window_pattern")
    return found


def _gpt_oss(reader: Reader, config: dict[str, Any]) -> dict[str, Any]:
    """Returns what is gpt-oss's own: windows, and YaRN whose bounds are no whole dimensions. What
    the file does not say of rotation, its config class would."""
    scaling = config["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling = {**scaling, "truncate": False}
    return {
        "sliding_window": reader.integer("attention.sliding_window"),
        "rope_scaling": scaling or {"rope_type": "default"},
    }
