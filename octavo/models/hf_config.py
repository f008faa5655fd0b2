"""Reading a Hugging Face config.json: every field by type, everything unknown refused.

Called by the family files. It knows field names that many families share, never a family's own;
it never imports torch or transformers. Defaults are those of `config_classes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.errors import UnsupportedModelError
from octavo.kernels.routing import RoutingRule
from octavo.layers.rope_spec import RopeSpec, RopeType
from octavo.models.config_classes import ConfigClass
from octavo.models.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec

if TYPE_CHECKING:
    from octavo.kernels.activations import Activation

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


_ROPE_CLASS = ConfigClass(
    defaults={"type": "default", "truncate": True},
    nullable=_ROPE_FIELDS["yarn"] - {"original_max_position_embeddings"}
    | {"partial_rotary_factor"},
)
"""`rope_scaling` and `rope_parameters`: what the formulas of transformers' RoPE types look up."""
NOTHING_KNOWN = ConfigClass()


class HFConfig:
    """Typed access to the fields of one JSON object.

    Absent means the default of transformers' config class; null means null, in the few fields where
    the class lets it be, and is refused in all others.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        where: str = "config.json",
        config_class: ConfigClass = NOTHING_KNOWN,
    ) -> None:
        self.fields = fields
        self.where = where
        self._class = config_class

    def refuse(self, name: str, known: str) -> NoReturn:
        """Raises UnsupportedModelError naming the field, its value and what is known."""
        name = self._spelling(name)
        if name in self.fields:
            value = self.fields[name]
            shown = "is null, its value is missing" if value is None else f"is {value!r}"
        else:
            default = self._class.defaults.get(name)
            shown = "is missing" + ("" if default is None else f", which means {default!r}")
        raise UnsupportedModelError(f"{self.where}: {name} {shown}; known: {known}")

    def value(self, name: str) -> Any:
        """Returns the field, or its default where it is absent; None where null is allowed, or
        where the field is missing and has no default."""
        found = self._spelling(name)
        if found not in self.fields:
            return self._class.defaults.get(name)
        value = self.fields[found]
        if value is None and name not in self._class.nullable:
            self.refuse(name, "any value but null; leave it out for the default")
        return value

    def _spelling(self, name: str) -> str:
        alias = self._class.aliases.get(name)
        return name if alias is None or alias not in self.fields else alias

    def integer(self, name: str, *, least: int = 1) -> int:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, f"an integer of at least {least}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.value(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, "a number above 0")
        if not 0 < value < math.inf:
            self.refuse(name, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.value(name) is None else self.number(name)

    def boolean(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def optional_integers(self, name: str) -> tuple[int, ...]:
        value = self.value(name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            self.refuse(name, "a list of integers")
        return tuple(value)

    def must_be_off(self, name: str) -> None:
        """Refuses a feature that Octavo does not have when the config turns it on."""
        if self.value(name) not in (None, False, 0):
            self.refuse(name, "only null or false")


def read_decoder(config: HFConfig, layer: Callable[[int], LayerSpec]) -> ModelSpec:
    """Returns the spec of a decoder whose layer i is `layer(i)`. Raises UnsupportedModelError."""
    config.must_be_off("quantization_config")
    layers = tuple(layer(index) for index in range(config.integer("num_hidden_layers")))
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=layers,
        norm_eps=config.number("rms_norm_eps"),
        tie_embeddings=config.boolean("tie_word_embeddings"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rope=read_rope(config, layers[0].attention.head_size),
    )


def read_attention(
    config: HFConfig, *, qkv_bias: bool = False, o_bias: bool = False
) -> AttentionSpec:
    """Returns full attention of the config's sizes."""
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
        qkv_bias=qkv_bias,
        o_bias=o_bias,
    )


def read_activation(config: HFConfig) -> Activation:
    name = config.text("hidden_act")
    if name not in ACTIVATIONS:
        config.refuse("hidden_act", ", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def read_mlp(config: HFConfig) -> MLPSpec:
    """Returns the dense MLP of the config."""
    size = config.integer("intermediate_size")
    return MLPSpec(size=size, activation=read_activation(config))


def read_moe(
    config: HFConfig,
    *,
    size_field: str,
    count_field: str = "num_experts",
    renormalize: bool,
) -> MoESpec:
    """Returns the experts of the config; `size_field` names the field of their hidden size, and
    `count_field` that of their number."""
    num_experts = config.integer(count_field)
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


def read_windows(
    config: HFConfig, is_windowed: Callable[[int], bool], window: int | None
) -> tuple[int | None, ...]:
    """Returns each layer's window: from layer_types if given, else where `is_windowed`."""
    num_layers = config.integer("num_hidden_layers")
    types = config.value("layer_types")
    if types is None:
        return tuple(window if is_windowed(i) else None for i in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window, "attention": None}
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(isinstance(name, str) and name in known for name in types)
    ):
        config.refuse("layer_types", f"{num_layers} times one of {', '.join(known)}")
    if window is None and "sliding_attention" in types:
        config.refuse("sliding_window", "a window, since layer_types has sliding_attention")
    return tuple(known[name] for name in types)


def read_rope(config: HFConfig, head_size: int) -> RopeSpec:
    """Returns the rotary embedding, from `rope_scaling` where that says anything, else from
    `rope_parameters` (transformers 5). Raises UnsupportedModelError on unknown types and fields."""
    name = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    given = config.value(name) or {}
    if not isinstance(given, Mapping):
        config.refuse(name, "an object")
    rope = HFConfig(given, f"{config.where}: {name}", _ROPE_CLASS)
    rope_type = _rope_type(rope)
    for part in (config, rope):
        if part.optional_number("partial_rotary_factor") not in (None, 1.0):
            part.refuse("partial_rotary_factor", "1.0")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[rope_type]}
    for field in sorted({field for field, value in given.items() if value is not None} - known):
        rope.refuse(field, f"for {rope_type}: {', '.join(sorted(known))}")
    plain = RopeSpec(
        type="default",
        theta=(rope if "rope_theta" in given else config).number("rope_theta"),
        rotary_dim=head_size,
        original_max_position_embeddings=config.integer("max_position_embeddings"),
    )
    return plain if rope_type == "default" else _scaled_rope(config, rope, rope_type, plain)


def _rope_type(rope: HFConfig) -> RopeType:
    field = "rope_type" if "rope_type" in rope.fields else "type"
    name = rope.text(field)
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
    original = longest
    for part in (config, rope):
        if name in part.fields:
            original = part.integer(name)
            break
    scaled = replace(plain, type=rope_type, original_max_position_embeddings=original)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.refuse("high_freq_factor", f"a number above low_freq_factor ({low:g})")
        factor = rope.number("factor")
        return replace(scaled, factor=factor, low_freq_factor=low, high_freq_factor=high)
    # null, as in DeepSeek-V3, means the ratio of the lengths
    factor = longest / original if rope.value("factor") is None else rope.number("factor")
    return replace(
        scaled,
        factor=factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=_or_default(rope, "beta_fast", 32.0),
        beta_slow=_or_default(rope, "beta_slow", 1.0),
        truncate=rope.value("truncate") is not None and rope.boolean("truncate"),
    )


def _or_default(rope: HFConfig, name: str, default: float) -> float:
    """0 and null stand for the default in some fields of yarn."""
    return rope.number(name) if rope.value(name) else default


def _yarn_attention_factor(rope: HFConfig, factor: float) -> float:
    """YaRN (arXiv 2309.00071, 3.4): longer contexts need a sharper softmax."""
    given = rope.optional_number("attention_factor")
    if given is not None:
        return given

    def sharpness(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = (_or_default(rope, n, 0.0) for n in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        return sharpness(mscale) / sharpness(mscale_all_dim)
    return sharpness(1.0)
