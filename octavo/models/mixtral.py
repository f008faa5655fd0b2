"""Mixtral: every MLP is a set of experts whose chosen weights sum to 1.

Read by the registry. Data only: it never touches a tensor.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import config_classes
from octavo.models.family import Family, moe_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import read_attention, read_decoder, read_moe, read_window
from octavo.models.spec import LayerSpec, ModelSpec


def read_mixtral(config: HFConfig) -> ModelSpec:
    attention = replace(read_attention(config), visibility=read_window(config))
    moe = read_moe(
        config,
        size_field="intermediate_size",
        count_field="num_local_experts",
        renormalize=True,
    )
    layer = LayerSpec(attention=attention, mlp=moe)
    return read_decoder(config, lambda _: layer)


MIXTRAL = Family(config_class=config_classes.MIXTRAL, read=read_mixtral, names=moe_names("mixtral"))
