"""Layers that keep fewer experts than the model had: `moe_sparsity_config` of compressed-tensors.

Read by the registry, behind every family. Data only: it never touches a tensor. Source:
compressed-tensors 0.20 (REAP and others prune so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from octavo.errors import UnsupportedModelError
from octavo.models.mlp_spec import MoESpec
from octavo.models.spec import LayerSpec, ModelSpec

_FIELD = "quantization_config: moe_sparsity_config"


def read_pruned(config: Mapping[str, Any], spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the experts that each layer has left, where the config says so. Raises
    UnsupportedModelError."""
    said = config.get("quantization_config")
    sparsity = said.get("moe_sparsity_config") if isinstance(said, Mapping) else None
    if sparsity is None:
        return spec
    if not isinstance(sparsity, Mapping):
        _refuse("", sparsity, "an object with method and num_experts")
    if sparsity.get("method") != "prune":
        _refuse(".method", sparsity.get("method"), "prune: experts that are left out")
    counts = sparsity.get("num_experts")
    if not isinstance(counts, list) or len(counts) != len(spec.layers):
        _refuse(".num_experts", counts, f"a list of {len(spec.layers)}, one for each layer")
    pairs = zip(spec.layers, counts, strict=True)
    return replace(spec, layers=tuple(_pruned(i, *pair) for i, pair in enumerate(pairs)))


def _pruned(index: int, layer: LayerSpec, count: Any) -> LayerSpec:
    field, mlp = f".num_experts[{index}]", layer.mlp
    if not isinstance(mlp, MoESpec):
        if count is not None:
            _refuse(field, count, "null: the layer is dense")
        return layer
    groups = mlp.rule.num_groups
    is_count = type(count) is int and mlp.top_k <= count <= mlp.num_experts
    if not is_count or count % groups:
        known = f"a number from {mlp.top_k} to {mlp.num_experts}"
        _refuse(field, count, known if groups == 1 else f"{known}, a multiple of {groups}")
    return replace(layer, mlp=replace(mlp, num_experts=count))


def _refuse(field: str, value: Any, known: str) -> NoReturn:
    raise UnsupportedModelError(f"{_FIELD}{field} is {value!r}; known: {known}")
