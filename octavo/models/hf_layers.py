"""Reading what many families' config.json share: sizes, attention, MLPs, experts, windows.

Called by the family files. It knows field names that many families share, never a family's own; it
never imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from octavo.kernels.activations import Activation
from octavo.kernels.routing import RoutingRule
from octavo.layers.rope_spec import RopeSpec
from octavo.models.attention_spec import AttentionSpec
from octavo.models.hf_config import HFConfig
from octavo.models.hf_rope import read_rope
from octavo.models.mlp_spec import MLPSpec, MoESpec
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.visibility import Full, Visibility, Window

FULL, SLIDING = "full_attention", "sliding_attention"
"""Names of `layer_types`."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_decoder(config: HFConfig, layer: Callable[[int], LayerSpec]) -> ModelSpec:
    """Returns the spec of a decoder whose layer i is `layer(i)`. Raises UnsupportedModelError."""
    layers = tuple(layer(index) for index in range(config.count("num_hidden_layers")))
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=layers,
        norm_eps=config.number("rms_norm_eps"),
        tie_embeddings=config.boolean("tie_word_embeddings"),
        max_position_embeddings=config.integer("max_position_embeddings"),
    )


def read_attention(
    config: HFConfig,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    rope: Callable[[HFConfig, int], RopeSpec] = read_rope,
) -> AttentionSpec:
    """Returns full attention of the config's sizes; `rope` reads what a family writes otherwise."""
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    size = config.optional_integer("head_dim") or hidden // num_heads
    if size % 2 or size == 0:
        config.refuse("head_dim", f"an even number (hidden_size // heads is {hidden // num_heads})")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        scale=size**-0.5,
        rope=rope(config, size),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )


def read_activation(config: HFConfig, field: str = "hidden_act") -> Activation:
    name = config.text(field)
    if name not in ACTIVATIONS:
        config.refuse(field, ", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def read_mlp(
    config: HFConfig,
    *,
    size_field: str = "intermediate_size",
    activation_field: str = "hidden_act",
) -> MLPSpec:
    """Returns the dense MLP of the config."""
    activation = read_activation(config, activation_field)
    return MLPSpec(size=config.integer(size_field), activation=activation)


def read_moe(
    config: HFConfig,
    *,
    size_field: str,
    count_field: str = "num_experts",
    renormalize: bool,
) -> MoESpec:
    """Returns the experts of the config; `size_field` names the field of their hidden size, and
    `count_field` that of their number."""
    num_experts = config.count(count_field)
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        config.refuse("num_experts_per_tok", f"at most {count_field} ({num_experts})")
    return MoESpec(
        num_experts=num_experts,
        expert_size=config.integer(size_field),
        activation=read_activation(config),
        rule=RoutingRule(top_k=top_k, renormalize=renormalize),
    )


def is_sparse_layer(config: HFConfig, layer: int) -> bool:
    """Whether `layer` has experts in configs with decoder_sparse_step and mlp_only_layers."""
    step = config.integer("decoder_sparse_step")
    return layer not in config.optional_integers("mlp_only_layers") and (layer + 1) % step == 0


def read_window(config: HFConfig) -> Visibility:
    """Returns the window of all layers that have one."""
    size = config.optional_integer("sliding_window")
    return Full() if size is None else Window(size)


def read_layer_types(
    config: HFConfig, known: Collection[str], default: Callable[[int], str]
) -> tuple[str, ...]:
    """Returns each layer's type, one of `known`: from layer_types if given, else what `default`
    says. There "attention" is another word for full attention."""
    num_layers = config.count("num_hidden_layers")
    types = config.value("layer_types")
    if types is None:
        return tuple(default(index) for index in range(num_layers))
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(isinstance(name, str) and name in (*known, "attention") for name in types)
    ):
        config.refuse("layer_types", f"{num_layers} times one of {', '.join(known)}")
    return tuple(FULL if name == "attention" else name for name in types)


def read_some_windows(config: HFConfig, types: Collection[str]) -> Mapping[str, Visibility]:
    """Returns what a layer of each type sees, for families whose windowed layers need a window."""
    window = read_window(config)
    if window == Full() and SLIDING in types:
        config.refuse("sliding_window", f"a window, since there are layers of {SLIDING}")
    return {FULL: Full(), SLIDING: window}


def read_windows(
    config: HFConfig, is_windowed: Callable[[int], bool], window: Visibility
) -> tuple[Visibility, ...]:
    """Returns what each layer sees: from layer_types if given, else a window where
    `is_windowed`."""
    known = {FULL: Full(), SLIDING: window}
    types = read_layer_types(config, known, lambda i: SLIDING if is_windowed(i) else FULL)
    if window == Full() and SLIDING in types and config.value("layer_types"):
        config.refuse("sliding_window", "a window, since layer_types has sliding_attention")
    return tuple(known[name] for name in types)
