"""Gemma 2 and Gemma 3 (text): norms on both sides, windows on most layers, scaled embeddings.

Gemma 3 also comes as the text part of a model that sees: its vision is not loaded. Read by the
registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from octavo.layers.rope_spec import RopeSpec
from octavo.models import config_classes
from octavo.models.attention_spec import AttentionSpec
from octavo.models.family import DENSE_NAMES, VISION_NAMES, Family
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import (
    FULL,
    SLIDING,
    read_attention,
    read_decoder,
    read_layer_types,
    read_mlp,
    read_some_windows,
)
from octavo.models.hf_rope import rope_of
from octavo.models.spec import LayerSpec, ModelSpec

_LAYER = "model.layers.{layer}"
NAMES = {
    **DENSE_NAMES,
    "attention_post_norm": f"{_LAYER}.post_attention_layernorm.weight",
    "mlp_norm": f"{_LAYER}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": f"{_LAYER}.post_feedforward_layernorm.weight",
}


def read_gemma2(config: HFConfig) -> ModelSpec:
    bias = config.boolean("attention_bias")
    attention = replace(
        read_attention(config, qkv_bias=bias, o_bias=bias),
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        soft_cap=config.optional_number("attn_logit_softcapping"),
    )
    types = read_layer_types(config, (SLIDING, FULL), lambda i: FULL if i % 2 else SLIDING)
    return _read_gemma(config, types, {SLIDING: attention, FULL: attention})


def read_gemma3(config: HFConfig) -> ModelSpec:
    if config.value("attn_logit_softcapping") is not None:
        config.refuse("attn_logit_softcapping", "null: the scores of Gemma 3 are not capped")
    bias = config.boolean("attention_bias")

    def attention(kind: str) -> AttentionSpec:
        return replace(
            read_attention(
                config,
                qkv_bias=bias,
                o_bias=bias,
                rope=lambda config, size: _gemma3_rope(config, size, kind),
            ),
            scale=config.number("query_pre_attn_scalar") ** -0.5,
            qk_norm="head",
        )

    pattern = config.integer("sliding_window_pattern")
    types = read_layer_types(
        config, (SLIDING, FULL), lambda i: SLIDING if (i + 1) % pattern else FULL
    )
    return _read_gemma(config, types, {kind: attention(kind) for kind in (SLIDING, FULL)})


def read_gemma3_conditional(config: HFConfig) -> ModelSpec:
    spec = read_gemma3(config.inner("text_config", config_classes.GEMMA3))
    return replace(spec, tie_embeddings=config.boolean("tie_word_embeddings"))


def _gemma3_rope(config: HFConfig, head_size: int, kind: str) -> RopeSpec:
    """Each kind of layer has its own; `rope_scaling` is for the full ones alone."""
    given = config.value("rope_parameters") or {}
    scaling = config.value("rope_scaling") or {}
    if not isinstance(given, Mapping) or not given.keys() <= {SLIDING, FULL}:
        config.refuse("rope_parameters", f"an object with {SLIDING} and {FULL}")
    if not isinstance(scaling, Mapping):
        config.refuse("rope_scaling", "an object")
    mine = given.get(kind) or {}
    if not isinstance(mine, Mapping):
        config.refuse("rope_parameters", f"an object in {kind}")
    if kind == FULL:
        return rope_of(config, f"rope_parameters: {kind}", {**mine, **scaling}, head_size)
    field = "rope_local_base_freq"
    return rope_of(config, f"rope_parameters: {kind}", mine, head_size, field)


def _read_gemma(
    config: HFConfig, types: tuple[str, ...], attentions: Mapping[str, AttentionSpec]
) -> ModelSpec:
    config.must_be_off("use_bidirectional_attention")
    mlp = read_mlp(config, activation_field="hidden_activation")
    windows = read_some_windows(config, types)
    layers = tuple(
        LayerSpec(
            attention=replace(attentions[kind], visibility=windows[kind]), mlp=mlp, post_norms=True
        )
        for kind in types
    )
    return replace(
        read_decoder(config, lambda index: layers[index]),
        norm_offset=1.0,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        logit_soft_cap=config.optional_number("final_logit_softcapping"),
    )


GEMMA2 = Family(config_class=config_classes.GEMMA2, read=read_gemma2, names=NAMES)
GEMMA3 = Family(config_class=config_classes.GEMMA3, read=read_gemma3, names=NAMES)
GEMMA3_CONDITIONAL = Family(
    config_class=config_classes.GEMMA3_CONDITIONAL,
    read=read_gemma3_conditional,
    names=NAMES,
    ignorable=VISION_NAMES,
)
