"""GLM-4.5, 4.5-Air, 4.6: grouped-query attention that rotates part of a head, experts chosen and
weighted as DeepSeek-V3's.

Read by the registry. Data only: it never touches a tensor. Layers that predict tokens further ahead
come with the checkpoints and are not loaded.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import config_classes
from octavo.models.deepseek import PREDICTORS, read_sigmoid_moe
from octavo.models.family import Family, moe_names, shared_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import read_attention, read_decoder, read_mlp
from octavo.models.hf_rope import read_partial_rope
from octavo.models.spec import LayerSpec, ModelSpec


def read_glm4_moe(config: HFConfig) -> ModelSpec:
    attention = read_attention(
        config, qkv_bias=config.boolean("attention_bias"), rope=read_partial_rope
    )
    if config.boolean("use_qk_norm"):
        attention = replace(attention, qk_norm="head")
    moe, dense = read_sigmoid_moe(config), read_mlp(config)
    first = config.integer("first_k_dense_replace", least=0)
    return read_decoder(
        config,
        lambda index: LayerSpec(attention=attention, mlp=moe if index >= first else dense),
    )


GLM4_MOE = Family(
    config_class=config_classes.GLM4_MOE,
    read=read_glm4_moe,
    names={**moe_names("glm4_moe"), **shared_names("mlp.shared_experts")},
    ignorable=PREDICTORS,
)
