"""Llama and Mistral: dense decoders with grouped-query attention, full or windowed everywhere.

Read by the registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import config_classes
from octavo.models.family import DENSE_NAMES, Family
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import read_attention, read_decoder, read_mlp, read_window
from octavo.models.spec import LayerSpec, ModelSpec


def read_llama(config: HFConfig) -> ModelSpec:
    config.must_be_off("mlp_bias")
    bias = config.boolean("attention_bias")
    attention = read_attention(config, qkv_bias=bias, o_bias=bias)
    layer = LayerSpec(attention=attention, mlp=read_mlp(config))
    return read_decoder(config, lambda _: layer)


def read_mistral(config: HFConfig) -> ModelSpec:
    attention = replace(read_attention(config), visibility=read_window(config))
    layer = LayerSpec(attention=attention, mlp=read_mlp(config))
    return read_decoder(config, lambda _: layer)


LLAMA = Family(config_class=config_classes.LLAMA, read=read_llama, names=DENSE_NAMES)
MISTRAL = Family(config_class=config_classes.MISTRAL, read=read_mistral, names=DENSE_NAMES)
