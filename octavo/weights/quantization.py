"""What a checkpoint says of how it is quantised: `quantization_config` of its config.json.

Asked by `hub`, so that a plan refuses what a load would, and by `loader`. Never reads a tensor and
never imports torch. Which tensors are quantised follows from those that are there (`published`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.formats import kv_formats
from octavo.weights.checkpoint import read_json
from octavo.weights.made import DUMMY_QUANTIZATIONS, LOAD_FORMATS, can_be_made
from octavo.weights.schemes import (
    WHOLE_ROW,
    Scheme,
    Schemes,
    auto_round_schemes,
    compressed_schemes,
    gptq_schemes,
    modelopt_schemes,
)

Method = Literal["fp8", "awq", "gptq", "compressed-tensors", "mxfp4", "modelopt"]
METHODS: dict[str, Method] = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "awq": "awq",
    "gptq": "gptq",
    "auto-round": "gptq",
    "intel/auto-round": "gptq",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "mxfp4",
    "modelopt": "modelopt",
}
"""By `quant_method`. AutoRound stores what GPTQ, AWQ or compressed-tensors store."""
_AUTO_ROUND: dict[str, tuple[Method, bool]] = {
    "auto_round:auto_gptq": ("gptq", True),
    "auto_round": ("gptq", False),
    "auto_round:gptqmodel": ("gptq", False),
    "auto_round:auto_awq": ("awq", False),
    "auto_round:llm_compressor": ("compressed-tensors", False),
}
"""By `packing_format`: the method, and whether zeros are stored less one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the quantised tensors of a checkpoint are to be read."""

    method: Method
    schemes: Schemes = Schemes()
    """What codes the tensors have, by module."""
    zeros_less_one: bool = False
    """Whether zeros are stored less one (the first format of GPTQ)."""
    is_reordered: bool = False
    """Whether columns may belong to groups out of order (GPTQ's `desc_act`)."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where the config says so (FP8)."""
    may_be_plain: bool = False
    """Whether the config says that no tensor is quantised, only the KV cache or less still."""
    kv_cache: str | None = None
    """What the checkpoint's scales of keys and values are for, "fp8" or another name; None: it
    has none, or each vector is to have its own."""


def read_quantization(config: Mapping[str, Any], folder: Path | None) -> Quantization | None:
    """Returns how a checkpoint is quantised, None if it is not.

    `folder` may hold it in a file of its own (`_beside`). Raises UnsupportedModelError naming the
    field, its value and what is known.
    """
    fields = config.get("quantization_config")
    if fields is None and isinstance(text := config.get("text_config"), dict):
        fields = text.get("quantization_config")
    if fields is None and folder is not None:
        fields = _beside(folder)
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise UnsupportedModelError(f"quantization_config must be an object, not {fields!r}")
    return replace(_read(fields), kv_cache=_kv_cache(fields))


def _beside(folder: Path) -> Mapping[str, Any] | None:
    """Returns what a file of its own says, where config.json says nothing: NVIDIA's, or those that
    the first tools of GPTQ and AWQ wrote."""
    found = (read_json(folder / "hf_quant_config.json") or {}).get("quantization")
    if found:
        return {"quant_method": "modelopt", **found}
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if said := read_json(folder / name):
            return {"quant_method": method, **said}
    return None


_ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq", "modelopt_fp4": "modelopt"}
"""Words that vLLM has for the same checkpoints."""


def check_quantization(
    asked: str | None, found: Quantization | None, *, is_dummy: bool = False
) -> None:
    """Refuses a `quantization` option that is not how the checkpoint is quantised, nor what it, or
    random weights (`is_dummy`), can be made when it is loaded. Raises ConfigError."""
    is_plain = found is None or found.may_be_plain
    if asked is None or (is_plain and can_be_made(asked, is_dummy=is_dummy)):
        return
    known = METHODS.get(_ALIASES.get(asked, asked))
    if found is None:
        names = ", ".join((*LOAD_FORMATS, *(DUMMY_QUANTIZATIONS if is_dummy else ())))
        only = "" if is_dummy or asked not in DUMMY_QUANTIZATIONS else " (random weights can)"
        raise ConfigError(
            f"quantization {asked!r}: the model is not quantised{only}, and can be made {names} "
            "when it is loaded; use one of them, or leave the option out",
            field="quantization",
        )
    if known != found.method:
        raise ConfigError(
            f"quantization {asked!r}: the model is quantised with {found.method}; leave the option "
            "out",
            field="quantization",
        )


def check_kv_cache(formats: str, found: Quantization | None) -> None:
    """Refuses the KV formats called `formats` where they would read a checkpoint's scales, which
    are for others. Raises ConfigError."""
    stored = None if found is None else found.kv_cache
    if formats != "auto" and kv_formats(formats).name == "fp8" and stored not in (None, "fp8"):
        raise ConfigError(
            f"kv_cache_dtype {formats!r}: the checkpoint's scales of keys and values are for "
            f"{stored} (quantization_config: kv_cache_scheme, kv_cache_quant_algo); use int8 or "
            "auto, which need none of them",
            field="kv_cache_dtype",
        )


def _kv_cache(fields: Mapping[str, Any]) -> str | None:
    """Reads `kv_cache_scheme` of compressed-tensors and of ModelOpt, or the latter's
    `kv_cache_quant_algo`."""
    scheme, algorithm = fields.get("kv_cache_scheme"), fields.get("kv_cache_quant_algo")
    if scheme is None:
        return None if algorithm is None else str(algorithm).lower()
    if not isinstance(scheme, Mapping):
        _refuse("kv_cache_scheme", scheme, "an object with type, num_bits, strategy and dynamic")
    if scheme.get("dynamic"):
        return None
    bits, kind, strategy = (scheme.get(name) for name in ("num_bits", "type", "strategy"))
    is_known = strategy in (None, "tensor", "attn_head") and scheme.get("symmetric") is not False
    if is_known and (kind, bits) == ("float", 8):
        return "fp8"
    return " ".join(str(word) for word in (kind, bits, strategy) if word is not None)


def _read(fields: Mapping[str, Any]) -> Quantization:
    name = fields.get("quant_method")
    method = METHODS.get(str(name))
    if method is None:
        near = difflib.get_close_matches(str(name).lower(), METHODS, 1, 0.4)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UnsupportedModelError(
            f"quantization_config: quant_method {name!r} is not known: known are "
            f"{', '.join(METHODS)}{hint}"
        )
    if name in ("auto-round", "intel/auto-round"):
        return _auto_round(fields)
    if method == "gptq":
        return _gptq(fields)
    if method == "awq":
        version = str(fields.get("version") or "gemm").lower()
        if version != "gemm":
            _refuse("version", version, "gemm")
        bits = fields.get("bits", fields.get("w_bit", 4))
        if bits != 4:
            _refuse("bits", bits, "4")
        scheme = Scheme(kind="int", bits=4, group=_group(fields))
        return Quantization(method="awq", schemes=Schemes(others=(scheme,)))
    if fields.get("transform_config"):
        _refuse("transform_config", "...", "weights that are not rotated")
    if method == "fp8":
        return Quantization(method="fp8", block=_block(fields.get("weight_block_size")))
    is_plain = fields.get("config_groups") == {} or fields.get("quant_algo", "") is None
    if method == "modelopt" and not fields.get("config_groups"):
        schemes = modelopt_schemes(fields.get("quant_algo"), fields.get("quantized_layers"))
    else:
        ignored = fields.get("ignore") if method == "compressed-tensors" else ()
        schemes = compressed_schemes(fields.get("config_groups"), ignored)
    return Quantization(method=method, schemes=schemes, may_be_plain=is_plain)


def _auto_round(fields: Mapping[str, Any]) -> Quantization:
    packing = str(fields.get("packing_format") or "auto_round:auto_gptq")
    if packing not in _AUTO_ROUND:
        _refuse("packing_format", packing, ", ".join(_AUTO_ROUND))
    method, is_less = _AUTO_ROUND[packing]
    if method == "compressed-tensors":
        schemes = compressed_schemes(fields.get("config_groups"), fields.get("ignore"))
        return Quantization(method=method, schemes=schemes)
    return Quantization(
        method=method,
        schemes=auto_round_schemes(_base(fields), fields.get("extra_config")),
        zeros_less_one=is_less,
    )


def _gptq(fields: Mapping[str, Any]) -> Quantization:
    kind = str(fields.get("checkpoint_format") or fields.get("format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", kind, "gptq, gptq_v2")
    return Quantization(
        method="gptq",
        schemes=gptq_schemes(_base(fields), fields.get("dynamic")),
        zeros_less_one=kind == "gptq",
        is_reordered=bool(fields.get("desc_act")),
    )


def _base(fields: Mapping[str, Any]) -> Scheme:
    bits = fields.get("bits", 4)
    if bits not in (2, 3, 4, 8):
        _refuse("bits", bits, "2, 3, 4, 8")
    return Scheme(kind="int", bits=bits, group=_group(fields))


def _group(fields: Mapping[str, Any]) -> int | None:
    group = fields.get("group_size", fields.get("q_group_size"))
    if group is not None and (type(group) is not int or group < WHOLE_ROW or group == 0):
        _refuse("group_size", group, "a number of columns, or -1 for a whole row")
    return group


def _block(found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    if not (
        isinstance(found, list | tuple)
        and len(found) == 2
        and all(type(size) is int and size > 0 for size in found)
    ):
        _refuse("weight_block_size", found, "two sizes, as [128, 128]")
    return found[0], found[1]


def _refuse(field: str, value: Any, known: str) -> NoReturn:
    raise UnsupportedModelError(
        f"quantization_config: {field} {value!r} cannot be read; known: {known}"
    )
