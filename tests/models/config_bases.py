"""Small configs of every family, and values that their fields may have."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
GROUPED: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    **GROUPED,
}
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 5, "num_experts_per_tok": 2}
BASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2},
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, **LOCAL_EXPERTS},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 5, **LOCAL_EXPERTS},
    "deepseek_v2": {**LATENT, "n_group": 3, "topk_group": 2},
    "deepseek_v3": {**LATENT, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT,
    "glm4_moe": {**GROUPED, "head_dim": 8, "n_group": 3, "topk_group": 2},
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "vocab_size": (97,),
    "hidden_size": (16,),
    "intermediate_size": (28,),
    "num_hidden_layers": (3,),
    "num_attention_heads": (6,),
    "num_key_value_heads": (1, 4),
    "head_dim": (8,),
    "max_position_embeddings": (128,),
    "rms_norm_eps": (1e-3,),
    "tie_word_embeddings": (True,),
    "attention_bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "gelu_pytorch_tanh", "gelu_new"),
    "use_sliding_window": (False, True),
    "sliding_window": (6,),
    "max_window_layers": (0, 2),
    "layer_types": (["full_attention"] * 4, ["attention"] * 4),
    "num_experts": (3,),
    "num_local_experts": (3,),
    "num_experts_per_tok": (1, 3),
    "moe_intermediate_size": (8,),
    "shared_expert_intermediate_size": (8,),
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": ([], [1]),
    "norm_topk_prob": (True, False),
    "clip_qkv": (0.5,),
    "rope_theta": (500.0,),
    "rope_scaling": ({}, {"rope_type": "linear", "factor": 2.0}, {"type": "default"}),
    "rope_parameters": ({}, {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}),
    "partial_rotary_factor": (1.0,),
    "hidden_activation": ("silu", "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": (5,),
    "final_logit_softcapping": (3.0,),
    "attn_logit_softcapping": (2.0,),
    "use_bidirectional_attention": (False,),
    "sliding_window_pattern": (3,),
    "rope_local_base_freq": (33.0,),
    "original_max_position_embeddings": (16,),
    "swiglu_alpha": (1.1,),
    "swiglu_limit": (2.0,),
    "intermediate_size_mlp": (36,),
    "moe_layers": ([], [1]),
    "interleave_moe_layer_step": (1, 2),
    "use_qk_norm": (True, False),
    "no_rope_layers": ([], [0, 1, 1, 0]),
    "no_rope_layer_interval": (2,),
    "attention_chunk_size": (9,),
    "attn_temperature_tuning": (True, False),
    "floor_scale": (16,),
    "attn_scale": (0.3,),
    "kv_lora_rank": (12,),
    "q_lora_rank": (12,),
    "qk_nope_head_dim": (8,),
    "qk_rope_head_dim": (6,),
    "v_head_dim": (8,),
    "n_routed_experts": (3, 12),
    "n_shared_experts": (2,),
    "n_group": (1, 2),
    "topk_group": (1, 3),
    "topk_method": ("greedy", "group_limited_greedy"),
    "first_k_dense_replace": (0, 2, 9),
    "mlp_layer_types": (["dense", "sparse", "sparse", "dense"],),
    "moe_layer_freq": (1,),
    "scoring_func": (),
    "routed_scaling_factor": (3.5,),
    "rope_interleave": (True, False),
}
"""Values that transformers can use, by field."""
WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_local_experts": 16,
}
"""Sizes that the defaults of the others fit."""
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {"moe_layer_freq": 1, **_SIGMOID},
    "glm4_moe_lite": {"moe_layer_freq": 1, "first_k_dense_replace": 1},
    "glm4_moe": {"moe_layer_freq": 1},
}
"""Fields of checkpoints that transformers ignores, and the one value that it computes with."""
GROUPED_KINDS = frozenset(FIXED)
LATENT_KINDS = GROUPED_KINDS - {"glm4_moe"}
TIED_SIZES = frozenset(
    {
        "num_attention_heads",
        "num_key_value_heads",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
    }
)
"""Of grouped experts and latent attention: the default of one does not fit small others."""


def base(model_type: str) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **SIZES,
        **BASES.get(model_type, {}),
    }


UNLIKE = {
    ("olmoe", "head_dim"): "transformers norms the size of the hidden state",
    ("olmoe", "sliding_window"): "it has no windows",
    ("gemma3_text", "attn_logit_softcapping"): "transformers ignores it, we refuse it",
    ("gpt_oss", "hidden_act"): "transformers ignores it, we refuse all but silu",
    ("deepseek_v2", "norm_topk_prob"): "transformers ignores it, we refuse true",
    ("deepseek_v3", "topk_method"): "transformers ignores it, we refuse others",
    ("glm4_moe_lite", "first_k_dense_replace"): "transformers ignores it, we refuse others",
    **{
        (kind, "num_attention_heads"): "transformers ignores fewer kv heads, we refuse them"
        for kind in LATENT_KINDS
    },
}
