"""What a GGUF file says of experts in groups, and of layers behind the model's own. No torch.

Asked by `gguf_config` and `gguf_source`. Keys that contradict each other, or the tensors that sizes
come from, are refused by name.
"""

from __future__ import annotations

from typing import Any

from octavo.weights.gguf_architecture import Architecture
from octavo.weights.gguf_experts import (
    ROWS_OF_EXPERTS,
    dense_layers,
    expert_size,
    first_sparse,
)
from octavo.weights.gguf_reader import Reader


def num_layers(reader: Reader) -> int:
    """Returns the layers of the model, without those behind them that predict tokens further
    ahead."""
    num_blocks = reader.size("block_count")
    num_predictors = reader.integer("nextn_predict_layers", 0)
    if not 0 <= num_predictors < num_blocks:
        raise reader.refuse("nextn_predict_layers", f"less than block_count, {num_blocks}")
    return num_blocks - num_predictors


def grouped_experts_config(reader: Reader, architecture: Architecture) -> dict[str, Any]:
    """Returns the keys of the experts, and of the layers before them."""
    num_experts = reader.size("expert_count")
    dense = dense_layers(reader, num_layers(reader))
    first = first_sparse(dense)
    if dense != list(range(first)) or reader.integer("leading_dense_block_count", 0) != first:
        raise reader.refuse(
            "leading_dense_block_count", f"{first}, as layers without ffn_gate_inp are {dense}"
        )
    size = expert_size(reader, first)
    reader.check_implied("expert_feed_forward_length", size, ROWS_OF_EXPERTS)
    config = {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": reader.size("expert_used_count"),
        "n_shared_experts": reader.size("expert_shared_count"),
        "moe_intermediate_size": size,
        "moe_layer_freq": 1,
        "first_k_dense_replace": first,
        # 0 stands for no scale
        "routed_scaling_factor": as_written(reader.number("expert_weights_scale", 1.0) or 1.0),
        "norm_topk_prob": bool(reader.value("expert_weights_norm") or False),
        **_groups(reader),
    }
    if first:
        config["intermediate_size"] = reader.size("feed_forward_length")
    if architecture.model_type == "glm4_moe":
        if reader.integer("expert_gating_func", 0) not in (0, 2):
            raise reader.refuse("expert_gating_func", "2 (sigmoid)")
        return config
    if architecture.model_type == "deepseek_v3":
        return {**config, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if config["norm_topk_prob"]:
        raise reader.refuse("expert_weights_norm", "false where scores are a softmax")
    method = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    return {**config, "scoring_func": "softmax", "topk_method": method}


def _groups(reader: Reader) -> dict[str, int]:
    """Returns how many groups of experts there are, and how many a token goes to; files that leave
    them out have one, as llama.cpp takes them."""
    if (count := reader.integer("expert_group_count", 0)) < 2:
        return {"n_group": 1, "topk_group": 1}
    return {"n_group": count, "topk_group": reader.size("expert_group_used_count")}


def as_written(value: float) -> float:
    """Returns the short decimal that a float32 of the file was made of."""
    return float(f"{value:.7g}")
