"""What a GGUF file of architecture `deepseek2` says of attention and of its experts. No torch.

Asked by `gguf_config`. Keys that contradict each other, or the tensors that sizes come from, are
refused by name.
"""

from __future__ import annotations

from typing import Any

from octavo.weights.gguf_architecture import Architecture
from octavo.weights.gguf_experts import dense_layers, expert_size, first_sparse
from octavo.weights.gguf_reader import Reader

_QUERY_LATENTS = "blk.0.attn_q_a.weight"


def latent_attention_config(reader: Reader) -> dict[str, Any]:
    """Returns the keys of attention.

    Files of newer converters describe attention as it is computed, with one key and value head for
    all: a head's own sizes are then in keys that end with `_mla`.
    """
    num_heads, rank = reader.size("attention.head_count"), reader.size("attention.kv_lora_rank")
    rope_size = reader.size("rope.dimension_count")
    if reader.integer("attention.head_count_kv", num_heads) not in (1, num_heads):
        raise reader.refuse("attention.head_count_kv", f"1 or the number of heads, {num_heads}")
    end = ""
    if reader.value("attention.key_length_mla") is not None:
        end = "_mla"
        _check(reader, "attention.key_length", rank + rope_size, "kv_lora_rank + dimension_count")
        _check(reader, "attention.value_length", rank, "kv_lora_rank")
    head_size = reader.size(f"attention.key_length{end}")
    if head_size <= rope_size:
        more = f"more than rope.dimension_count, {rope_size}"
        raise reader.refuse(f"attention.key_length{end}", more)
    return {
        "num_hidden_layers": num_latent_layers(reader),
        "num_key_value_heads": num_heads,
        "head_dim": rope_size,
        "kv_lora_rank": rank,
        "q_lora_rank": _query_rank(reader),
        "qk_nope_head_dim": head_size - rope_size,
        "qk_rope_head_dim": rope_size,
        "v_head_dim": reader.size(f"attention.value_length{end}"),
        "rope_interleave": True,  # no converter reorders the rows
    }


def num_latent_layers(reader: Reader) -> int:
    """Returns the layers of the model, without those behind them that predict tokens further
    ahead."""
    num_blocks = reader.size("block_count")
    num_predictors = reader.integer("nextn_predict_layers", 0)
    if not 0 <= num_predictors < num_blocks:
        raise reader.refuse("nextn_predict_layers", f"less than block_count, {num_blocks}")
    return num_blocks - num_predictors


def yarn_sharpness(reader: Reader) -> dict[str, float]:
    """Returns the two fields of YaRN that the file has as one, times 0.1: they are equal in it."""
    sharpness = 10 * reader.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not sharpness:
        return {}
    return dict.fromkeys(("mscale", "mscale_all_dim"), _as_written(sharpness))


def latent_experts_config(reader: Reader, architecture: Architecture) -> dict[str, Any]:
    """Returns the keys of the experts, and of the layers before them."""
    num_experts = reader.size("expert_count")
    dense = dense_layers(reader, num_latent_layers(reader))
    first = first_sparse(dense)
    if dense != list(range(first)) or reader.integer("leading_dense_block_count", 0) != first:
        raise reader.refuse(
            "leading_dense_block_count", f"{first}, as layers without ffn_gate_inp are {dense}"
        )
    size = expert_size(reader, first)
    _check(reader, "expert_feed_forward_length", size, "the rows of the experts")
    config = {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": reader.size("expert_used_count"),
        "n_shared_experts": reader.size("expert_shared_count"),
        "moe_intermediate_size": size,
        "moe_layer_freq": 1,
        "first_k_dense_replace": first,
        # 0 stands for no scale
        "routed_scaling_factor": _as_written(reader.number("expert_weights_scale", 1.0) or 1.0),
        "norm_topk_prob": bool(reader.value("expert_weights_norm") or False),
        **_groups(reader),
    }
    if first:
        config["intermediate_size"] = reader.size("feed_forward_length")
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


def _query_rank(reader: Reader) -> int | None:
    """Returns the size of the queries' latent vectors, which must be that of their tensor."""
    rank = reader.integer("attention.q_lora_rank", 0)
    rows = 0
    if _QUERY_LATENTS in reader.file.tensors:
        rows = reader.shape(_QUERY_LATENTS)[0]
    if rank != rows:
        tensor = f"the rows of {_QUERY_LATENTS}" if rows else f"as there is no {_QUERY_LATENTS}"
        raise reader.refuse("attention.q_lora_rank", f"{rows}, {tensor}")
    return rank or None


def _check(reader: Reader, key: str, expected: int, why: str) -> None:
    """Refuses another value of a key that follows from others, where it is there."""
    if reader.integer(key, expected) != expected:
        raise reader.refuse(key, f"{expected}, {why}")


def _as_written(value: float) -> float:
    """Returns the short decimal that a float32 of the file was made of."""
    return float(f"{value:.7g}")
