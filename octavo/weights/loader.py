"""Opens the weights of a resolved model, and accounts for every name in them.

Called by the runner when it builds a model. Never builds layers, never decides what is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from octavo.errors import ConfigError, UnsupportedModelError, WeightsError
from octavo.weights.cast import CastSource
from octavo.weights.dummy import DummySource
from octavo.weights.gguf_source import open_gguf
from octavo.weights.hub import ModelFiles
from octavo.weights.made import can_be_made
from octavo.weights.published.source import PackedSource
from octavo.weights.quantized import QuantizedSource
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import DTYPE_FORMATS, TensorSource

KV_SCALE_SUFFIXES = {
    "keys": ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale"),
    "values": ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale"),
}
"""What scales of fp8 keys and values are called, below a layer's attention."""
ALWAYS_IGNORABLE = (
    "*.rotary_emb.inv_freq",
    *(f"*.self_attn.{name}" for names in KV_SCALE_SUFFIXES.values() for name in names),
    "*.self_attn.q_scale",
    "*.self_attn.prob_scale",
)
"""Buffers that old checkpoints saved although they follow from the config; scales of the KV cache,
which is not always in the format that they are for; scales of what is never quantised here."""
_NAMES_SHOWN = 5


def open_source(
    files: ModelFiles,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    quantization: str | None = None,
) -> TensorSource:
    """Returns the weights of `files`; `shapes` and `seed` are for dummy weights.

    `dtype` "auto" keeps the format of the file, else every matrix is converted when it is loaded.
    `quantization` (see `check_quantization`) is what weights that are not quantised become. Raises
    ConfigError, WeightsError or UnsupportedModelError.
    """
    source = _open_stored(files, dtype, shapes, seed)
    stored = files.quantization
    if quantization is None or (stored is not None and not stored.may_be_plain):
        return source
    if not can_be_made(quantization, is_dummy=files.kind == "config"):
        return source
    packed = sorted(name for name in source.names() if _is_packed(source, name))
    if packed:
        raise ConfigError(
            f"quantization {quantization!r}: {packed[0]} is in {source.format(packed[0]).name} "
            "already; leave the option out, or convert it first with --dtype bfloat16",
            field="quantization",
        )
    return QuantizedSource(source, quantization)


def _is_packed(source: TensorSource, name: str) -> bool:
    return len(source.shape(name)) == 2 and source.format(name).is_block


def _open_stored(
    files: ModelFiles, dtype: str, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> TensorSource:
    """Returns the weights as they are stored, or in `dtype`."""
    quantization = files.quantization
    if files.kind == "config":
        if quantization is not None and not quantization.may_be_plain:
            raise UnsupportedModelError(
                f"the model is quantised with {quantization.method}, and random weights are "
                "numbers: take quantization_config out of its config.json"
            )
        return DummySource(shapes, _config_dtype(files.config) if dtype == "auto" else dtype, seed)
    if files.kind == "gguf":
        source = open_gguf(files.path)
    else:
        source = open_safetensors(files.path, str(files.config.get("model_type")), quantization)
    if dtype != "auto":
        return CastSource(source, dtype)
    if isinstance(source, PackedSource):
        source.check_packed()
    return source


def check_names(
    source: TensorSource,
    expected: Mapping[str, tuple[int, ...]],
    ignorable: Sequence[str] = (),
) -> None:
    """Raises WeightsError unless the source has exactly the expected tensors, in their shapes.

    Surplus names that match a shell pattern of `ignorable` are let pass, such as the `lm_head` of a
    model with tied embeddings, and biases of zeros, which tools of GPTQ write beside every matrix.
    """
    names = source.names()
    patterns = (*ALWAYS_IGNORABLE, *ignorable)
    surplus = [
        name
        for name in names - expected.keys()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
        and not _adds_nothing(source, name)
    ]
    wrong = [
        f"{name} has shape {list(source.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in names and source.shape(name) != tuple(shape)
    ]
    problems = [
        _list("missing", expected.keys() - names),
        _list("not known to this model", surplus),
        _list("of another shape than the config says", wrong),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise WeightsError(
            f"the weights do not match the config: {'; '.join(found)}; check that config and "
            "weights belong together"
        )


def _adds_nothing(source: TensorSource, name: str) -> bool:
    is_bias = name.endswith(".bias") and len(source.shape(name)) == 1
    return is_bias and not source.vector(name).any()


def _list(what: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - _NAMES_SHOWN} more" if len(ordered) > _NAMES_SHOWN else ""
    return f"{len(ordered)} {what}: {', '.join(ordered[:_NAMES_SHOWN])}{more}"


def _config_dtype(config: Mapping[str, Any]) -> str:
    """Returns the dtype that a config.json names (transformers 5 and before), or bfloat16."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in DTYPE_FORMATS:
        raise UnsupportedModelError(
            f"the config says dtype {name!r}; known are {', '.join(DTYPE_FORMATS)}: choose one "
            "with --dtype"
        )
    return name
