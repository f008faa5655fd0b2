"""What transformers' config classes take for a field that a config.json leaves out, and which
fields may be null: facts of each `model_type`, compared with the classes themselves in the tests.

Kept by the families, asked by `hf_config.HFConfig`. Data only; never imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigClass:
    """One config class. A field of neither mapping must be in the config.json."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Field -> its value where it is absent."""
    nullable: frozenset[str] = frozenset()
    """Fields that may be null, which is a value of its own and not the default."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Field -> another name of it, which wins where a config.json has both."""


_ALL: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "quantization_config": None,
}
_NULLABLE = frozenset(
    {"rope_parameters", "rope_scaling", "partial_rotary_factor", "quantization_config"}
)
_HEADS = {"num_key_value_heads"}
_WINDOW = {"sliding_window"}
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
_LAYER_WINDOWS = {**_WINDOWS, "max_window_layers": 28, "layer_types": None}
_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
_QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
_QWEN_DENSE = {**_ALL, **_QWEN, **_LAYER_WINDOWS, "intermediate_size": 22_016}
_MISTRAL_SIZES = {
    "vocab_size": 32_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131_072,
}

LLAMA = ConfigClass(
    defaults={
        **_ALL,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    nullable=_NULLABLE | _HEADS | {"head_dim"},
)
MISTRAL = ConfigClass(
    defaults={**_ALL, **_MISTRAL_SIZES, "sliding_window": 4096},
    nullable=_NULLABLE | _WINDOW | {"head_dim"},
)
MIXTRAL = ConfigClass(
    defaults={
        **_ALL,
        **_MISTRAL_SIZES,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    nullable=_NULLABLE | _WINDOW | {"head_dim"},
    aliases={"num_local_experts": "num_experts"},
)
QWEN2 = ConfigClass(
    defaults={**_QWEN_DENSE, "num_key_value_heads": 32},
    nullable=_NULLABLE | _HEADS | _WINDOW | {"layer_types"},
)
QWEN3 = ConfigClass(
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    nullable=QWEN2.nullable,
)
QWEN2_MOE = ConfigClass(
    defaults={
        **_ALL,
        **_QWEN,
        **_LAYER_WINDOWS,
        **_SPARSE,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    nullable=_NULLABLE | _WINDOW | {"layer_types", "mlp_only_layers"},
)
QWEN3_MOE = ConfigClass(
    defaults={
        **_ALL,
        **_QWEN,
        **_WINDOWS,
        **_SPARSE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    nullable=_NULLABLE | _WINDOW | {"mlp_only_layers"},
    aliases={"num_experts": "num_local_experts"},
)
OLMOE = ConfigClass(
    defaults={
        **_ALL,
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": None,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    nullable=_NULLABLE | _HEADS | _WINDOW | {"clip_qkv"},
    aliases={"num_experts": "num_local_experts"},
)
