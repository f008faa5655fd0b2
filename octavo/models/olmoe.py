"""OLMoE: experts everywhere, queries and keys normed over the whole projection, perhaps clipped.

Read by the registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import config_classes
from octavo.models.family import Family, moe_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import read_attention, read_decoder, read_moe
from octavo.models.spec import LayerSpec, ModelSpec


def read_olmoe(config: HFConfig) -> ModelSpec:
    config.must_be_off("sliding_window")
    bias = config.boolean("attention_bias")
    attention = replace(
        read_attention(config, qkv_bias=bias, o_bias=bias),
        qk_norm="projection",
        clip_qkv=config.optional_number("clip_qkv"),
    )
    renormalize = config.boolean("norm_topk_prob")
    moe = read_moe(config, size_field="intermediate_size", renormalize=renormalize)
    layer = LayerSpec(attention=attention, mlp=moe)
    return read_decoder(config, lambda _: layer)


OLMOE = Family(config_class=config_classes.OLMOE, read=read_olmoe, names=moe_names("olmoe"))
