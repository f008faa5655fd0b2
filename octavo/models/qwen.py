"""Qwen2, Qwen3 and their MoE kin: windows on some layers, head norms, a gated shared expert.

Read by the registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import config_classes
from octavo.models.attention_spec import AttentionSpec
from octavo.models.family import DENSE_NAMES, Family, moe_names, shared_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import (
    is_sparse_layer,
    read_attention,
    read_decoder,
    read_mlp,
    read_moe,
    read_window,
    read_windows,
)
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.visibility import Full, Visibility

QWEN2_MOE_NAMES = {
    **moe_names("qwen2_moe"),
    "shared_router": "model.layers.{layer}.mlp.shared_expert_gate.weight",
    **shared_names("mlp.shared_expert"),
}


def _window(config: HFConfig) -> Visibility:
    """A window is in force only where it is asked for; null is none."""
    asked = config.boolean("use_sliding_window")
    return read_window(config) if asked else Full()


def _read_dense(config: HFConfig, attention: AttentionSpec) -> ModelSpec:
    first = config.integer("max_window_layers", least=0)
    windows = read_windows(config, lambda layer: layer >= first, _window(config))
    mlp = read_mlp(config)
    return read_decoder(
        config, lambda i: LayerSpec(attention=replace(attention, visibility=windows[i]), mlp=mlp)
    )


def read_qwen2(config: HFConfig) -> ModelSpec:
    return _read_dense(config, read_attention(config, qkv_bias=True))


def read_qwen3(config: HFConfig) -> ModelSpec:
    return _read_dense(config, _qwen3_attention(config))


def _qwen3_attention(config: HFConfig) -> AttentionSpec:
    bias = config.boolean("attention_bias")
    attention = read_attention(config, qkv_bias=bias, o_bias=bias)
    return replace(attention, qk_norm="head")


def read_qwen2_moe(config: HFConfig) -> ModelSpec:
    attention = read_attention(config, qkv_bias=config.boolean("qkv_bias"))
    # unlike the dense Qwen2, windows are on every second of the *first* max_window_layers
    last = config.integer("max_window_layers", least=0)
    window = _window(config)
    windows = read_windows(config, lambda i: i % 2 == 0 and i < last, window)
    if window == Full() and config.boolean("use_sliding_window"):
        config.refuse("sliding_window", "a window, since use_sliding_window is true")
    renormalize = config.boolean("norm_topk_prob")
    moe = replace(
        read_moe(config, size_field="moe_intermediate_size", renormalize=renormalize),
        shared_size=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )

    dense = read_mlp(config)

    def layer(index: int) -> LayerSpec:
        mlp = moe if is_sparse_layer(config, index) else dense
        return LayerSpec(attention=replace(attention, visibility=windows[index]), mlp=mlp)

    return read_decoder(config, layer)


def read_qwen3_moe(config: HFConfig) -> ModelSpec:
    attention = replace(_qwen3_attention(config), visibility=_window(config))
    renormalize = config.boolean("norm_topk_prob")
    moe = read_moe(config, size_field="moe_intermediate_size", renormalize=renormalize)

    dense = read_mlp(config)

    def layer(index: int) -> LayerSpec:
        mlp = moe if is_sparse_layer(config, index) else dense
        return LayerSpec(attention=attention, mlp=mlp)

    return read_decoder(config, layer)


QWEN2 = Family(config_class=config_classes.QWEN2, read=read_qwen2, names=DENSE_NAMES)
QWEN3 = Family(config_class=config_classes.QWEN3, read=read_qwen3, names=DENSE_NAMES)
QWEN2_MOE = Family(
    config_class=config_classes.QWEN2_MOE, read=read_qwen2_moe, names=QWEN2_MOE_NAMES
)
QWEN3_MOE = Family(
    config_class=config_classes.QWEN3_MOE, read=read_qwen3_moe, names=moe_names("qwen3_moe")
)
