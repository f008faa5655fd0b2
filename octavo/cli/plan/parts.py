"""Which part of a model how many bytes of weights are, from its spec or the headers of its files.

Called by the plan. Never reads a weight.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.models.family import Family
    from octavo.models.spec import ModelSpec
    from octavo.weights.gguf_file import GGUFFile

PART_NAMES: tuple[str, ...] = (
    "embeddings",
    "attention",
    "dense MLPs",
    "experts",
    "shared experts",
    "rest",
)
_GGUF_PARTS = (
    (r"(token_embd|output)\.", "embeddings"),
    (r"blk\.\d+\.attn_(?!norm)", "attention"),
    (r"blk\.\d+\.ffn_\w+_shexp", "shared experts"),
    (r"blk\.\d+\.ffn_(gate|up|down)(_exps|\.\d+)\.", "experts"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.weight", "dense MLPs"),
)


def spec_parts(spec: ModelSpec, element_bytes: int) -> dict[str, int]:
    """Returns the bytes of every part when each number takes `element_bytes`."""
    parts = dict.fromkeys(PART_NAMES, 0)
    for parameter, shape in spec.parameters():
        parts[_part_of(parameter.name)] += math.prod(shape) * element_bytes
    return parts


def made_parts(spec: ModelSpec, family: Family, number_bytes: int, made: str) -> dict[str, int]:
    """Returns the bytes of every part when weights are quantised as they are loaded."""
    from octavo.weights.made import made_format

    parts = dict.fromkeys(PART_NAMES, 0)
    for parameter, shape in spec.parameters():
        form = made_format(made, family.weight_name(parameter), shape, len(spec.layers))
        row_bytes = shape[-1] * number_bytes if form is None else form.row_bytes(shape[-1])
        parts[_part_of(parameter.name)] += math.prod(shape[:-1]) * row_bytes
    return parts


def gguf_parts(file: GGUFFile) -> dict[str, int]:
    """Returns the bytes of every part as a GGUF file stores it, from its header."""
    parts = dict.fromkeys(PART_NAMES, 0)
    for name, tensor in file.tensors.items():
        part = next((part for pattern, part in _GGUF_PARTS if re.match(pattern, name)), "rest")
        *rows, cols = tensor.shape
        parts[part] += math.prod(rows) * tensor.format.row_bytes(cols)
    return parts


def packed_parts(spec: ModelSpec, family: Family, folder: Path) -> dict[str, int]:
    """Returns the bytes of every part as a quantised checkpoint stores it, from its headers."""
    from octavo.errors import UnsupportedModelError
    from octavo.weights.names import text_name
    from octavo.weights.sizes import stored_bytes

    stored = stored_bytes(folder)
    if not stored:
        raise UnsupportedModelError(
            "how large a quantised model is stands in the headers of its weights, and they are not "
            "here: download it first, or plan it unpacked with --dtype bfloat16"
        )
    part_of = {family.weight_name(one): _part_of(one.name) for one, _ in spec.parameters()}
    parts = dict.fromkeys(PART_NAMES, 0)
    for name, size in stored.items():
        plain = text_name(name)
        other = "experts" if ".experts." in plain else "rest"
        module = plain.rpartition(".")[0]
        parts[part_of.get(plain) or part_of.get(f"{module}.weight", other)] += size
    return parts


def _part_of(name: str) -> str:
    if name in ("embedding", "lm_head"):
        return "embeddings"
    if name.startswith("expert_"):
        return "experts"
    if name.startswith("shared_"):
        return "shared experts"
    if name in ("gate", "up", "down"):
        return "dense MLPs"
    if name in ("attention_norm", "mlp_norm", "final_norm", "router"):
        return "rest"
    return "attention"
