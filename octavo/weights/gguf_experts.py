"""What a GGUF file says of experts, as config.json would: counts by key, sizes by tensor. No torch.

Asked by `gguf_config` and `gguf_latent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.weights.gguf_architecture import Architecture
from octavo.weights.gguf_reader import Reader

_GATING = {"gpt_oss": {3: "3 (softmax of the chosen)"}}
"""What `expert_gating_func` may be besides softmax."""
ROWS_OF_EXPERTS = "the rows of the experts"


def experts_config(reader: Reader, architecture: Architecture) -> dict[str, Any]:
    """Returns the keys of a MoE model; the sizes come from the tensors, which always hold them."""
    known = {1: "1 (softmax)", **_GATING.get(architecture.model_type, {})}
    if reader.integer("expert_gating_func", 1) not in known:
        raise reader.refuse("expert_gating_func", " or ".join(known.values()))
    if reader.number("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise reader.refuse("expert_weights_scale", "1.0")
    dense = dense_layers(reader, reader.integer("block_count"))
    first = first_sparse(dense)
    size = expert_size(reader, first)
    reader.check_implied("expert_feed_forward_length", size, ROWS_OF_EXPERTS)
    if architecture.model_type in ("mixtral", "olmoe"):  # whose layers all have experts
        reader.check_implied("feed_forward_length", size, ROWS_OF_EXPERTS)
    config: dict[str, Any] = {"num_experts_per_tok": reader.integer("expert_used_count")}
    num_experts = reader.integer("expert_count")
    norm = reader.value("expert_weights_norm")
    if architecture.model_type in ("mixtral", "gpt_oss"):
        if norm not in (None, True):
            raise reader.refuse("expert_weights_norm", "true")
        return {**config, "num_local_experts": num_experts, "intermediate_size": size}
    config["num_experts"] = num_experts
    config["norm_topk_prob"] = architecture.norm_topk_prob if norm is None else bool(norm)
    if architecture.model_type == "olmoe":
        return {
            **config,
            "intermediate_size": size,
            "clip_qkv": reader.number("attention.clamp_kqv", 0.0) or None,
        }
    config.update(moe_intermediate_size=size, decoder_sparse_step=1, mlp_only_layers=dense)
    if architecture.model_type == "qwen2_moe":
        name = f"blk.{first}.ffn_gate_shexp.weight"
        shared = reader.shape(name)[0]
        reader.check_implied("expert_shared_feed_forward_length", shared, f"the rows of {name}")
        config["shared_expert_intermediate_size"] = shared
    return config


def dense_layers(reader: Reader, num_layers: int) -> list[int]:
    """Returns those of the first layers that have no router."""
    names = (f"blk.{layer}.ffn_gate_inp.weight" for layer in range(num_layers))
    return [layer for layer, name in enumerate(names) if name not in reader.file.tensors]


def first_sparse(dense: Sequence[int]) -> int:
    """Returns the first layer that is not in `dense`; the number of layers if all are."""
    return next(layer for layer in range(len(dense) + 1) if layer not in dense)


def expert_size(reader: Reader, layer: int) -> int:
    """Returns the rows of one expert's gate: stacked, with up in one tensor, or, in older files, in
    a tensor of its own."""
    prefix, tensors = f"blk.{layer}.ffn_", reader.file.tensors
    if (stacked := f"{prefix}gate_exps.weight") in tensors:
        return reader.shape(stacked, 3)[1]
    if (fused := f"{prefix}gate_up_exps.weight") in tensors:
        return reader.shape(fused, 3)[1] // 2
    return reader.shape(f"{prefix}gate.0.weight")[0]
