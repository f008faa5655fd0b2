"""Reading a Hugging Face config.json: every field by type, everything unknown refused.

Called by the family files. It knows field names that many families share, never a family's own;
it never imports torch or transformers. Defaults are those of transformers' config classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.errors import UnsupportedModelError
from octavo.layers.rope_spec import RopeSpec, RopeType
from octavo.models.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec

if TYPE_CHECKING:
    from octavo.kernels.ops import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_STRETCHED = frozenset({"factor", "original_max_position_embeddings"})
_ROPE_FIELDS: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": _STRETCHED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _STRETCHED
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


class HFConfig:
    """Typed access to the fields of one JSON object. An absent field and null are the same."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json") -> None:
        self.fields = fields
        self.where = where

    def refuse(self, name: str, known: str) -> NoReturn:
        """Raises UnsupportedModelError naming the field, its value and what is known."""
        value = self.fields.get(name)
        shown = "is missing" if value is None else f"is {value!r}"
        raise UnsupportedModelError(f"{self.where}: {name} {shown}; known: {known}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, f"an integer of at least {least}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.fields.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number above 0")
        if not 0 < value < math.inf:
            self.refuse(name, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.fields.get(name) in (None, 0) else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        value = self._get(name, [])
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            self.refuse(name, "a list of integers")
        return tuple(value)

    def must_be_off(self, name: str) -> None:
        """Refuses a feature that Octavo does not have when the config turns it on."""
        if self.fields.get(name) not in (None, False, 0):
            self.refuse(name, "only null or false")


def read_decoder(
    config: HFConfig, layer: Callable[[int], LayerSpec], *, default_theta: float = 10_000.0
) -> ModelSpec:
    """Returns the spec of a decoder whose layer i is `layer(i)`. Raises UnsupportedModelError."""
    config.must_be_off("quantization_config")
    layers = tuple(layer(index) for index in range(config.integer("num_hidden_layers")))
    max_position_embeddings = config.integer("max_position_embeddings")
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=layers,
        norm_eps=config.number("rms_norm_eps"),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_position_embeddings,
        rope=read_rope(config, layers[0].attention.head_size, default_theta),
    )


def read_attention(
    config: HFConfig, *, qkv_bias: bool = False, o_bias: bool = False, head_size: int | None = None
) -> AttentionSpec:
    """Returns full attention of the config's sizes; `head_size` is the family's own default."""
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    size = config.integer("head_dim", head_size or hidden // num_heads)
    if size % 2:
        config.refuse("head_dim", f"an even number (hidden_size // heads is {hidden // num_heads})")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        scale=size**-0.5,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )


def read_activation(config: HFConfig) -> Activation:
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        config.refuse("hidden_act", ", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def read_mlp(config: HFConfig) -> MLPSpec:
    """Returns the dense MLP of the config."""
    size = config.integer("intermediate_size")
    return MLPSpec(size=size, activation=read_activation(config))


def read_moe(config: HFConfig, *, size_field: str, renormalize: bool) -> MoESpec:
    """Returns the experts of the config; `size_field` names the field of their hidden size."""
    name = "num_experts" if config.fields.get("num_experts") is not None else "num_local_experts"
    num_experts = config.integer(name)
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        config.refuse("num_experts_per_tok", f"at most {name} ({num_experts})")
    return MoESpec(
        num_experts=num_experts,
        top_k=top_k,
        expert_size=config.integer(size_field),
        activation=read_activation(config),
        renormalize=renormalize,
    )


def is_sparse_layer(config: HFConfig, layer: int) -> bool:
    """Whether `layer` has experts in configs with decoder_sparse_step and mlp_only_layers."""
    step = config.integer("decoder_sparse_step", 1)
    return layer not in config.integers("mlp_only_layers") and (layer + 1) % step == 0


def read_windows(
    config: HFConfig, is_windowed: Callable[[int], bool], window: int | None
) -> tuple[int | None, ...]:
    """Returns each layer's window: from layer_types if given, else where `is_windowed`."""
    num_layers = config.integer("num_hidden_layers")
    types = config.fields.get("layer_types")
    if types is None:
        return tuple(window if is_windowed(i) else None for i in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    valid = isinstance(types, list) and len(types) == num_layers and set(types) <= set(known)
    if not valid:
        config.refuse("layer_types", f"{num_layers} times one of {', '.join(known)}")
    if window is None and "sliding_attention" in types:
        config.refuse("sliding_window", "a window, since layer_types has sliding_attention")
    return tuple(known[name] for name in types)


def read_rope(config: HFConfig, head_size: int, default_theta: float) -> RopeSpec:
    """Returns the rotary embedding, from `rope_parameters` (transformers 5) or else from
    `rope_scaling` and `rope_theta`. Raises UnsupportedModelError on unknown types and fields."""
    name = "rope_parameters" if config.fields.get("rope_parameters") else "rope_scaling"
    given = config.fields.get(name) or {}
    if not isinstance(given, Mapping):
        config.refuse(name, "an object")
    rope = HFConfig(given, f"{config.where}: {name}")
    rope_type = _rope_type(rope)
    for part in (config, rope):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            part.refuse("partial_rotary_factor", "1.0")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[rope_type]}
    for field in sorted({field for field, value in given.items() if value is not None} - known):
        rope.refuse(field, f"for {rope_type}: {', '.join(sorted(known))}")
    theta = rope.number("rope_theta", config.number("rope_theta", default_theta))
    longest = config.integer("max_position_embeddings")
    plain = RopeSpec(
        type="default",
        theta=theta,
        rotary_dim=head_size,
        original_max_position_embeddings=longest,
    )
    return plain if rope_type == "default" else _scaled_rope(config, rope, rope_type, plain)


def _rope_type(rope: HFConfig) -> RopeType:
    field = "rope_type" if "rope_type" in rope.fields else "type"
    name = rope.text(field, "default")
    for known in _ROPE_FIELDS:
        if name == known:
            return known
    rope.refuse(field, ", ".join(_ROPE_FIELDS))


def _scaled_rope(
    config: HFConfig, rope: HFConfig, rope_type: RopeType, plain: RopeSpec
) -> RopeSpec:
    if rope_type in ("linear", "dynamic"):
        return replace(plain, type=rope_type, factor=rope.number("factor"))
    # a top-level field comes first, as transformers reads it (Phi-3 writes it there)
    name = "original_max_position_embeddings"
    longest = plain.original_max_position_embeddings
    original = config.optional_integer(name) or rope.integer(name, longest)
    scaled = replace(plain, type=rope_type, original_max_position_embeddings=original)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.refuse("high_freq_factor", f"a number above low_freq_factor ({low:g})")
        factor = rope.number("factor")
        return replace(scaled, factor=factor, low_freq_factor=low, high_freq_factor=high)
    factor = rope.number("factor", longest / original)
    return replace(
        scaled,
        factor=factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )


def _yarn_attention_factor(rope: HFConfig, factor: float) -> float:
    """YaRN (arXiv 2309.00071, 3.4): longer contexts need a sharper softmax."""
    given = rope.optional_number("attention_factor")
    if given is not None:
        return given

    def sharpness(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = (rope.optional_number(n) for n in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        return sharpness(mscale) / sharpness(mscale_all_dim)
    return sharpness(1.0)
