"""Random tiny models of every family, saved by transformers as real checkpoints are.

Used by tests that need a model that is small, but whose sizes are all different.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

_BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **more}}


_GROUPED: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
}
_LATENT: dict[str, Any] = {
    **_GROUPED,
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_YARN_MSCALE = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.2
)
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 12},
    "llama-tied-biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "num_key_value_heads": 6,
    },
    "llama-gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "llama-linear": {"model_type": "llama", **_rope("linear", factor=3.0)},
    "llama-dynamic": {"model_type": "llama", **_rope("dynamic", factor=2.0)},
    "llama-llama3": {
        "model_type": "llama",
        "head_dim": 16,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    },
    "llama-yarn": {
        "model_type": "llama",
        "head_dim": 32,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=64),
    },
    "llama-yarn-mscale": {
        "model_type": "llama",
        "head_dim": 32,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.2,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 10},
    "mistral-window": {"model_type": "mistral", "sliding_window": 19},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 21,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": True},
    "qwen3-mixed": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 17,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {
        "model_type": "mixtral",
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral-window": {
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 18,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        **_MOE,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [3],
    },
    "qwen2-moe-window": {
        "model_type": "qwen2_moe",
        **_MOE,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", **_MOE, "head_dim": 16, "norm_topk_prob": True},
    "qwen3-moe-sparse": {
        "model_type": "qwen3_moe",
        **_MOE,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 16,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3},
    "olmoe-clipped": {
        "model_type": "olmoe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "clip_qkv": 0.8,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 19,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma2-uncapped": {
        "model_type": "gemma2",
        "head_dim": 10,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 9,
        "sliding_window": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 17,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "gemma3-capped": {
        "model_type": "gemma3_text",
        "head_dim": 14,
        "num_key_value_heads": 3,
        "query_pre_attn_scalar": 11,
        "sliding_window": 33,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 18,
        "num_hidden_layers": 4,
        "swiglu_limit": 1.0,
    },
    "gpt-oss-odd": {
        "model_type": "gpt_oss",
        "head_dim": 10,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 23,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "sliding_window": 33,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attention_bias": False,
        "swiglu_alpha": 0.9,
        **_rope("default"),
    },
    "deepseek-v2": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek-v2-lite": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "qk_nope_head_dim": 6,
        "v_head_dim": 5,
        **_YARN_MSCALE,
    },
    "deepseek-v3": {
        **_LATENT,
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "n_group": 3,
        "topk_group": 2,
        **_YARN_MSCALE,
    },
    "deepseek-v3-plain": {
        **_LATENT,
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "kv_lora_rank": 19,
        "qk_rope_head_dim": 6,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "attention_bias": True,
    },
    "glm4-moe-lite": {**_LATENT, "model_type": "glm4_moe_lite"},
    "glm4-moe-lite-dense-last": {
        **_LATENT,
        "model_type": "glm4_moe_lite",
        "q_lora_rank": None,
        "v_head_dim": 12,
        "n_group": 2,
        "topk_group": 1,
        "mlp_layer_types": ["sparse", "sparse", "dense"],
    },
    "glm4-moe": {
        **_GROUPED,
        "model_type": "glm4_moe",
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "glm4-moe-odd": {
        **_GROUPED,
        "model_type": "glm4_moe",
        "head_dim": 20,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "first_k_dense_replace": 2,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "moe_intermediate_size": 23,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=64, partial_rotary_factor=0.3),
    },
    "llama4": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 24,
        "floor_scale": 8,
        "attn_scale": 0.5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama4-two-experts": {
        "model_type": "llama4_text",
        "head_dim": 10,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size_mlp": 40,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_layers": [0, 1],
        "no_rope_layers": [0, 1, 1],
        "attention_chunk_size": 7,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model in transformers, and the folder it was saved to."""

    reference: PreTrainedModel
    folder: Path
    config: Mapping[str, Any]
    """The saved config.json."""


def save_tiny(
    case: str, folder: Path, seed: int = 0, auto: Any = AutoModelForCausalLM, **more: Any
) -> TinyModel:
    """Makes the model of `case` with weights large enough that a mistake shows in the logits;
    `auto` is the class that gives it its head, `more` are fields of its config."""
    torch.manual_seed(seed)
    fields = {**_BASE, **CASES[case], **more}
    known = CONFIG_MAPPING[fields["model_type"]]()
    for name in ("swiglu_alpha", "swiglu_limit"):  # Constants in older versions of transformers.
        if not hasattr(known, name):
            fields.pop(name, None)
    config = AutoConfig.for_model(**fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = auto.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith("norm.weight") and not config.model_type.startswith("gemma"):
            parameter.data += 1.0  # Gemma adds it itself
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    return TinyModel(reference=model, folder=folder, config=saved)
