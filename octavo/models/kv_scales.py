"""Scales of fp8 keys and values that a checkpoint brings: found by name, checked, given to layers.

Called by the runner's builder where the KV cache is fp8; elsewhere they mean nothing and are left.
Names: compressed-tensors and vLLM (`self_attn.k_scale`), NVIDIA's (`k_proj.k_scale`), and the older
`k_proj.output_scale`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.errors import WeightsError
from octavo.kernels.inputs import KVScales
from octavo.layers.attention import Attention
from octavo.models.decoder import Decoder
from octavo.models.family import Family
from octavo.models.parameter import Parameter
from octavo.weights.loader import KV_SCALE_SUFFIXES
from octavo.weights.source import TensorSource


def with_kv_scales(decoder: Decoder, family: Family, source: TensorSource) -> Decoder:
    """Returns the decoder whose layers quantise by the checkpoint's scales, those that have some.

    Raises WeightsError for a scale that is none, and for a layer with one of the two alone.
    """
    layers = []
    for layer in decoder.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention):
            query = family.weight_name(Parameter("q", mixer.layer))
            prefix = query[: query.rindex("q_proj")] if "q_proj" in query else query
            scales = _scales_of(source, prefix, mixer.op.num_kv_heads)
            if scales is not None:
                device = layer.mixer_norm.weight.device
                on_device = KVScales(
                    key_K=scales.key_K.to(device), value_K=scales.value_K.to(device)
                )
                layer = replace(
                    layer, mixer=replace(mixer, op=replace(mixer.op, kv_scales=on_device))
                )
        layers.append(layer)
    return replace(decoder, layers=tuple(layers))


def _scales_of(source: TensorSource, prefix: str, num_kv_heads: int) -> KVScales | None:
    names = source.names()
    found: dict[str, Tensor] = {}
    for role, suffixes in KV_SCALE_SUFFIXES.items():
        name = next((prefix + suffix for suffix in suffixes if prefix + suffix in names), None)
        if name is not None:
            found[role] = _checked(name, source.vector(name), num_kv_heads)
    if not found:
        return None
    if len(found) < len(KV_SCALE_SUFFIXES):
        raise WeightsError(f"{prefix} has scales of {' and '.join(found)} alone; it needs both")
    return KVScales(key_K=found["keys"], value_K=found["values"])


def _checked(name: str, scale: Tensor, num_kv_heads: int) -> Tensor:
    if scale.numel() not in (1, num_kv_heads):
        raise WeightsError(
            f"{name} has {scale.numel()} numbers; one, or one for each of {num_kv_heads} kv heads, "
            "is known"
        )
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise WeightsError(f"{name} must be above 0 and finite, got {scale.tolist()}")
    return scale.flatten().expand(num_kv_heads).contiguous()
