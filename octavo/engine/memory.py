"""From a model's spec to its memory plan: which KV format, how wide the activations are. No torch.

Called by the engine at start-up and by `octavo plan`, so that both say the same. The arithmetic is
`kv_cache.planner`.
"""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.formats import KVFormat, kv_format
from octavo.kv_cache.planner import ActivationShape, MemoryPlan, plan_memory
from octavo.models.spec import MLPSpec, ModelSpec, MoESpec


def resolve_kv_format(config: EngineConfig) -> KVFormat:
    """Returns the format of keys and values; "auto" is float32, which every CPU computes in."""
    return kv_format("float32" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype)


def activation_shape(spec: ModelSpec) -> ActivationShape:
    """Returns the widths of the widest layer."""
    qkv_size = max(layer.attention.q_size + 2 * layer.attention.kv_size for layer in spec.layers)
    return ActivationShape(
        hidden_size=spec.hidden_size,
        qkv_size=qkv_size,
        mlp_size=max(_mlp_size(layer.mlp, spec.hidden_size) for layer in spec.layers),
        vocab_size=spec.vocab_size,
    )


def plan_model(
    spec: ModelSpec, *, weights_bytes: int, config: EngineConfig, available_bytes: int
) -> MemoryPlan:
    """Returns the plan of a whole model. Raises CapacityError saying what would fit."""
    return plan_memory(
        spec.kv_specs(resolve_kv_format(config)),
        weights_bytes=weights_bytes,
        activations=activation_shape(spec),
        config=config,
        max_position_embeddings=spec.max_position_embeddings,
        available_bytes=available_bytes,
    )


def _mlp_size(mlp: MLPSpec | MoESpec, hidden_size: int) -> int:
    """Gate and up columns of one token; a MoE token also has its input and output per expert."""
    if isinstance(mlp, MoESpec):
        return mlp.top_k * (2 * mlp.expert_size + 2 * hidden_size) + 2 * mlp.shared_size
    return 2 * mlp.size
