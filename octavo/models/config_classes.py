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
}
_NULLABLE = frozenset({"rope_parameters", "rope_scaling", "partial_rotary_factor"})
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
GEMMA2 = ConfigClass(
    defaults={
        **{name: value for name, value in _ALL.items() if name != "hidden_act"},
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    nullable=_NULLABLE
    | _WINDOW
    | {
        "layer_types",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "use_bidirectional_attention",
    },
)
GEMMA3 = ConfigClass(
    defaults={
        **GEMMA2.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    nullable=GEMMA2.nullable,
)
GEMMA3_CONDITIONAL = ConfigClass(
    defaults={"text_config": {}, "tie_word_embeddings": True},
    nullable=frozenset(),
)
GPT_OSS = ConfigClass(
    defaults={
        **_ALL,
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    nullable=_NULLABLE | _WINDOW | {"layer_types"},
    aliases={"num_local_experts": "num_experts"},
)
LLAMA4 = ConfigClass(
    defaults={
        **_ALL,
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    nullable=_NULLABLE | {"layer_types", "moe_layers", "no_rope_layers", "attention_chunk_size"},
)
LLAMA4_CONDITIONAL = ConfigClass(
    defaults={"text_config": {}, "tie_word_embeddings": False},
    nullable=frozenset(),
)
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "moe_layer_freq": 1,
}
_SILENT = {"moe_layer_freq", "scoring_func"}
"""Fields that are not of the class: null says as little as nothing."""
DEEPSEEK_V2 = ConfigClass(
    defaults={
        **_ALL,
        **_LATENT,
        "vocab_size": 102_400,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": None,
        "topk_group": None,
        "norm_topk_prob": False,
    },
    nullable=_NULLABLE
    | _HEADS
    | _SILENT
    | {"q_lora_rank", "n_group", "topk_group", "norm_topk_prob", "num_experts_per_tok"},
    aliases={"n_routed_experts": "num_experts"},
)
DEEPSEEK_V3 = ConfigClass(
    defaults={
        **_ALL,
        **_LATENT,
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
    },
    nullable=_NULLABLE
    | _HEADS
    | _SILENT
    | {"q_lora_rank", "rope_interleave", "norm_topk_prob", "topk_method"},
    aliases={"n_routed_experts": "num_local_experts"},
)
GLM4_MOE_LITE = ConfigClass(
    defaults={
        **_ALL,
        **_LATENT,
        "vocab_size": 154_880,
        "hidden_size": 2048,
        "intermediate_size": 10_240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_interleave": True,
        "mlp_layer_types": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    nullable=_NULLABLE | _SILENT | {"q_lora_rank", "mlp_layer_types", "first_k_dense_replace"},
    aliases={"n_routed_experts": "num_local_experts"},
)
GLM4_MOE = ConfigClass(
    defaults={
        **_ALL,
        "vocab_size": 151_552,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    nullable=_NULLABLE | _SILENT,
    aliases={"n_routed_experts": "num_local_experts"},
)
