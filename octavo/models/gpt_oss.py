"""gpt-oss: windows on every other layer, sinks, biased experts with a clamped SwiGLU.

Read by the registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.kernels.activations import ClampedSwiGLU
from octavo.kernels.routing import RoutingRule
from octavo.layers.rope_spec import RopeSpec
from octavo.models import config_classes
from octavo.models.family import Family, moe_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import (
    FULL,
    SLIDING,
    read_attention,
    read_decoder,
    read_layer_types,
    read_moe,
    read_some_windows,
)
from octavo.models.hf_rope import rope_of
from octavo.models.spec import LayerSpec, ModelSpec

NAMES = {**moe_names("gpt_oss"), "sinks": "model.layers.{layer}.self_attn.sinks"}
_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Where a config says nothing of it."""


def read_gpt_oss(config: HFConfig) -> ModelSpec:
    bias = config.boolean("attention_bias")
    attention = replace(
        read_attention(config, qkv_bias=bias, o_bias=bias, rope=_read_rope), has_sinks=True
    )
    if config.text("hidden_act") != "silu":
        config.refuse("hidden_act", "silu: the experts' activation is gpt-oss's own")
    moe = replace(
        read_moe(
            config,
            size_field="intermediate_size",
            count_field="num_local_experts",
            renormalize=False,
        ),
        activation=ClampedSwiGLU(
            alpha=config.number("swiglu_alpha"), limit=config.number("swiglu_limit")
        ),
        router_bias=True,
        expert_bias=True,
    )
    rule = RoutingRule(top_k=moe.top_k, score="logit", weighting="softmax", renormalize=False)
    types = read_layer_types(config, (SLIDING, FULL), lambda i: FULL if i % 2 else SLIDING)
    windows = read_some_windows(config, types)
    layers = tuple(
        LayerSpec(
            attention=replace(attention, visibility=windows[kind]), mlp=replace(moe, rule=rule)
        )
        for kind in types
    )
    return read_decoder(config, lambda index: layers[index])


def _read_rope(config: HFConfig, head_size: int) -> RopeSpec:
    name = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    given = config.value(name)
    if given is None:
        given = _ROPE
    if not isinstance(given, Mapping):
        config.refuse(name, "an object")
    return rope_of(config, name, given, head_size)


GPT_OSS = Family(config_class=config_classes.GPT_OSS, read=read_gpt_oss, names=NAMES)
