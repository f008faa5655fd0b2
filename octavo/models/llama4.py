"""Llama 4 (text): chunks on rotated layers, full attention without rotation between, top-1 experts.

Its checkpoints are of models that see: their vision is not loaded. Read by the registry. Data only:
it never touches a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.kernels.routing import RoutingRule
from octavo.layers.rope_spec import QueryTemperature, RopeSpec
from octavo.models import config_classes
from octavo.models.attention_spec import AttentionSpec
from octavo.models.family import VISION_NAMES, Family, moe_names, shared_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import (
    FULL,
    read_attention,
    read_decoder,
    read_layer_types,
    read_mlp,
    read_moe,
)
from octavo.models.hf_rope import read_rope
from octavo.models.mlp_spec import MoESpec
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.visibility import Chunk, Full, Visibility

CHUNKED = "chunked_attention"
_BLOCK = "model.layers.{layer}.feed_forward"
NAMES = {
    **moe_names("llama4_text"),
    **{part: f"{_BLOCK}.{part}_proj.weight" for part in ("gate", "up", "down")},
    **shared_names("feed_forward.shared_expert"),
}


def read_llama4(config: HFConfig) -> ModelSpec:
    rotated, unrotated = _read_attentions(config)
    is_rotated = _read_rotated_layers(config)
    visible = _read_visibilities(config, is_rotated)
    moe_layers = _read_moe_layers(config)
    moe, dense = _read_experts(config), read_mlp(config, size_field="intermediate_size_mlp")

    def layer(index: int) -> LayerSpec:
        attention = rotated if is_rotated[index] else unrotated
        return LayerSpec(
            attention=replace(attention, visibility=visible[index]),
            mlp=moe if index in moe_layers else dense,
        )

    return read_decoder(config, layer)


def read_llama4_conditional(config: HFConfig) -> ModelSpec:
    spec = read_llama4(config.inner("text_config", config_classes.LLAMA4))
    return replace(spec, tie_embeddings=config.boolean("tie_word_embeddings"))


def _read_attentions(config: HFConfig) -> tuple[AttentionSpec, AttentionSpec]:
    """Returns the attention of layers with and without rotation."""
    bias = config.boolean("attention_bias")
    rotated = read_attention(config, qkv_bias=bias, o_bias=bias, rope=_read_paired_rope)
    temperature = None
    if config.boolean("attn_temperature_tuning"):
        temperature = QueryTemperature(
            floor=config.integer("floor_scale"), scale=config.number("attn_scale")
        )
    unrotated = replace(rotated, rope=None, temperature=temperature)
    if config.boolean("use_qk_norm"):
        rotated = replace(rotated, qk_norm="unweighted")
    return rotated, unrotated


def _read_paired_rope(config: HFConfig, head_size: int) -> RopeSpec:
    return replace(read_rope(config, head_size), pairs_neighbours=True)


def _read_rotated_layers(config: HFConfig) -> tuple[bool, ...]:
    """`no_rope_layers` has a 1 for a layer with rotation; an empty list says as little as null."""
    num_layers = config.count("num_hidden_layers")
    given = config.optional_integers("no_rope_layers")
    if given and len(given) < num_layers:
        config.refuse("no_rope_layers", f"at least {num_layers} numbers")
    if given:
        return tuple(bool(one) for one in given[:num_layers])
    interval = config.integer("no_rope_layer_interval")
    return tuple((index + 1) % interval != 0 for index in range(num_layers))


def _read_visibilities(config: HFConfig, is_rotated: tuple[bool, ...]) -> tuple[Visibility, ...]:
    size = config.optional_integer("attention_chunk_size")
    types = read_layer_types(
        config,
        (CHUNKED, FULL),
        lambda i: CHUNKED if is_rotated[i] and size is not None else FULL,
    )
    if size is None and CHUNKED in types:
        config.refuse("attention_chunk_size", f"a size, since layer_types has {CHUNKED}")
    chunk = Full() if size is None else Chunk(size)
    return tuple(chunk if kind == CHUNKED else Full() for kind in types)


def _read_moe_layers(config: HFConfig) -> frozenset[int]:
    if config.value("moe_layers") is not None:
        return frozenset(config.optional_integers("moe_layers"))
    step = config.integer("interleave_moe_layer_step")
    return frozenset(range(step - 1, config.count("num_hidden_layers"), step))


def _read_experts(config: HFConfig) -> MoESpec:
    moe = read_moe(
        config,
        size_field="intermediate_size",
        count_field="num_local_experts",
        renormalize=False,
    )
    rule = RoutingRule(
        top_k=moe.top_k, score="logit", weighting="sigmoid", renormalize=False, scales_input=True
    )
    return replace(moe, rule=rule, shared_size=moe.expert_size)


LLAMA4 = Family(config_class=config_classes.LLAMA4, read=read_llama4, names=NAMES)
LLAMA4_CONDITIONAL = Family(
    config_class=config_classes.LLAMA4_CONDITIONAL,
    read=read_llama4_conditional,
    names=NAMES,
    ignorable=VISION_NAMES,
)
