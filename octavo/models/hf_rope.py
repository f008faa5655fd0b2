"""Reading the rotary embedding of a Hugging Face config.json, old and new forms.

Called by `hf_layers` and by families whose layers differ in it. Every type and field that is not
known is refused. The formulas that use the fields: `octavo.layers.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.layers.rope_spec import RopeSpec, RopeType
from octavo.models.config_classes import ConfigClass
from octavo.models.hf_config import HFConfig

_PARTIAL = "partial_rotary_factor"
_STRETCHED = frozenset({"factor", "original_max_position_embeddings"})
_ROPE_FIELDS: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": _STRETCHED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _STRETCHED
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "proportional": frozenset({"factor"}),
}
_ROPE_CLASS = ConfigClass(
    defaults={"type": "default", "truncate": True},
    nullable=_ROPE_FIELDS["yarn"] - {"original_max_position_embeddings"} | {_PARTIAL},
)
"""`rope_scaling` and `rope_parameters`: what the formulas of transformers' RoPE types look up."""


def read_rope(config: HFConfig, head_size: int) -> RopeSpec:
    """Returns the rotary embedding of all layers, from `rope_scaling` where that says anything,
    else from `rope_parameters` (transformers 5). Raises UnsupportedModelError on unknown types and
    fields."""
    name, given = _given(config)
    return rope_of(config, name, given, head_size)


def read_partial_rope(config: HFConfig, head_size: int) -> RopeSpec:
    """As `read_rope`, of the first numbers of a head alone: as large a share of them as
    `partial_rotary_factor` says, which counts first where the other fields of the embedding are."""
    name, given = _given(config)
    rope = HFConfig(given, f"{config.where}: {name}", _ROPE_CLASS)
    rope_type = _rope_type(rope)
    part = rope if _PARTIAL in given else config
    if rope_type == "proportional" or (part is rope and given[_PARTIAL] is None):
        rope.refuse(_PARTIAL, "a number, for another type than proportional")
    factor = part.optional_number(_PARTIAL) or 1.0
    size = int(head_size * factor)
    if factor > 1.0 or size < 2 or size % 2:
        part.refuse(_PARTIAL, f"at most 1, and an even part of head_dim ({head_size})")
    return _rope(config, rope, rope_type, size)


def _given(config: HFConfig) -> tuple[str, Mapping[str, Any]]:
    """Returns the name and the value of the field that the embedding stands in."""
    name = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    given = config.value(name) or {}
    if not isinstance(given, Mapping):
        config.refuse(name, "an object")
    return name, given


def rope_of(
    config: HFConfig,
    name: str,
    given: Mapping[str, Any],
    head_size: int,
    theta_field: str = "rope_theta",
) -> RopeSpec:
    """Returns the rotary embedding that `given` describes, which the config has at `name`; its base
    may stand in the config's `theta_field` instead."""
    rope = HFConfig(given, f"{config.where}: {name}", _ROPE_CLASS)
    rope_type = _rope_type(rope)
    for part in (config,) if rope_type == "proportional" else (config, rope):
        if part.optional_number(_PARTIAL) not in (None, 1.0):
            part.refuse(_PARTIAL, "1.0")
    return _rope(config, rope, rope_type, head_size, theta_field)


def _rope(
    config: HFConfig,
    rope: HFConfig,
    rope_type: RopeType,
    rotary_dim: int,
    theta_field: str = "rope_theta",
) -> RopeSpec:
    given = rope.fields
    known = {"rope_type", "type", "rope_theta", _PARTIAL, *_ROPE_FIELDS[rope_type]}
    for field in sorted({field for field, value in given.items() if value is not None} - known):
        rope.refuse(field, f"for {rope_type}: {', '.join(sorted(known))}")
    has_theta = "rope_theta" in given
    plain = RopeSpec(
        type="default",
        theta=rope.number("rope_theta") if has_theta else config.number(theta_field),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=config.integer("max_position_embeddings"),
    )
    return plain if rope_type == "default" else _scaled_rope(config, rope, rope_type, plain)


def _rope_type(rope: HFConfig) -> RopeType:
    field = "rope_type" if "rope_type" in rope.fields else "type"
    name = rope.text(field)
    for known in _ROPE_FIELDS:
        if name == known:
            return known
    rope.refuse(field, ", ".join(_ROPE_FIELDS))


def _scaled_rope(
    config: HFConfig, rope: HFConfig, rope_type: RopeType, plain: RopeSpec
) -> RopeSpec:
    if rope_type in ("linear", "dynamic"):
        return replace(plain, type=rope_type, factor=rope.number("factor"))
    if rope_type == "proportional":
        return replace(
            plain,
            type=rope_type,
            factor=_or_default(rope, "factor", 1.0),
            proportion=_or_default(rope, _PARTIAL, 1.0),
        )
    # a top-level field comes first, as transformers reads it (Phi-3 writes it there)
    name = "original_max_position_embeddings"
    longest = plain.original_max_position_embeddings
    original = longest
    for part in (config, rope):
        if name in part.fields:
            original = part.integer(name)
            break
    scaled = replace(plain, type=rope_type, original_max_position_embeddings=original)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high < low:
            rope.refuse("high_freq_factor", f"low_freq_factor ({low:g}) or more")
        factor = rope.number("factor")
        return replace(scaled, factor=factor, low_freq_factor=low, high_freq_factor=high)
    # null, as in DeepSeek-V3, means the ratio of the lengths
    factor = longest / original if rope.value("factor") is None else rope.number("factor")
    return replace(
        scaled,
        factor=factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        score_factor=_sharpness(factor, _or_default(rope, "mscale_all_dim", 0.0)) ** 2,
        beta_fast=_or_default(rope, "beta_fast", 32.0),
        beta_slow=_or_default(rope, "beta_slow", 1.0),
        truncate=rope.value("truncate") is not None and rope.boolean("truncate"),
    )


def _or_default(rope: HFConfig, name: str, default: float) -> float:
    """0 and null stand for the default in some fields of yarn."""
    return rope.number(name) if rope.value(name) else default


def _yarn_attention_factor(rope: HFConfig, factor: float) -> float:
    """YaRN (arXiv 2309.00071, 3.4): longer contexts need a sharper softmax."""
    given = rope.optional_number("attention_factor")
    if given is not None:
        return given

    mscale, mscale_all_dim = (_or_default(rope, n, 0.0) for n in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        return _sharpness(factor, mscale) / _sharpness(factor, mscale_all_dim)
    return _sharpness(factor, 1.0)


def _sharpness(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
