"""Lists the tensors of a GGUF file under Hugging Face names, experts one by one.

Called by `loader` and the demo writer. Tensors stay in the file's own block format; only the query
and key rows of `llama` files, kept in ggml's RoPE order, are put into the half-split order, and the
halves of latent attention's kv_b, if apart, joined.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from octavo.errors import WeightsError
from octavo.formats import NVFP4
from octavo.weights.gguf_architecture import GROUPED_TYPES, LATENT_TYPES, architecture_of
from octavo.weights.gguf_config import ROPE_FACTORS
from octavo.weights.gguf_file import GGUFFile, GGUFTensor, read_gguf
from octavo.weights.gguf_grouped import num_layers
from octavo.weights.gguf_reader import Reader
from octavo.weights.latent_source import LatentSource, SplitUp
from octavo.weights.names import ExpertNames, expert_names
from octavo.weights.source import MappedFile, MappedSource, StoredTensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_UP = "self_attn.kv_b_proj"
_KEYS_UP = re.compile(r"blk\.(\d+)\.attn_k_b\.weight")
_GEMMA_LAYER = {
    **_LAYER,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT_OSS_LAYER = {**_LAYER, "post_attention_norm": "post_attention_layernorm"}
_SHARED = {
    f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")
}
_LATENT_LAYER = {
    **_LAYER,
    **_SHARED,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": _UP,
}
_LAYERS = {
    "gemma3_text": _GEMMA_LAYER,
    "gpt_oss": _GPT_OSS_LAYER,
    "glm4_moe": {**_GPT_OSS_LAYER, **_SHARED},
    **dict.fromkeys(LATENT_TYPES, _LATENT_LAYER),
}
_STACKED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
_LAYER_OF = re.compile(r"blk\.(\d+)\.")
_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(?:(\d+)\.)?(weight|bias)")


def open_gguf(path: Path) -> MappedSource:
    """Returns the tensors of a GGUF file. Tensors that no family knows keep their GGUF name.

    Raises WeightsError and UnsupportedModelError as `read_gguf` does.
    """
    file = read_gguf(path)
    architecture = architecture_of(file)
    scales = _scales(file)
    lister = _Lister(
        scales=scales,
        files={part: MappedFile(part) for part in file.paths},
        names=expert_names(architecture.model_type),
        layer_names=_LAYERS.get(architecture.model_type, _LAYER),
        head_counts=_interleaved_heads(file),
        norm_offset=architecture.norm_offset,
    )
    halves: dict[str, tuple[str, str]] = {}
    if architecture.model_type in GROUPED_TYPES:
        file = _without_predictors(file)
    if architecture.model_type in LATENT_TYPES:
        halves = _halves(file)
    # Factors of frequencies are in the config, those of matrices with their matrices.
    listed = {ROPE_FACTORS, *map(_scale_of, scales), *chain.from_iterable(halves.values())}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        if name not in listed:
            tensors.update(lister.list(name, tensor))
    if not halves:
        return MappedSource(tensors)
    ups = {
        f"model.layers.{layer}.{_UP}.weight": SplitUp(
            keys=lister.stored(file.tensors[keys]), values=lister.stored(file.tensors[values])
        )
        for layer, (keys, values) in halves.items()
    }
    return LatentSource(tensors, ups)


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"


def _scales(file: GGUFFile) -> dict[str, tuple[float, ...]]:
    """Returns matrix -> what its numbers are multiplied with, in NVFP4 that has a scale for all, or
    one for each expert of a stack. Raises WeightsError."""
    found: dict[str, tuple[float, ...]] = {}
    for name, tensor in file.tensors.items():
        scale = file.tensors.get(_scale_of(name)) if tensor.format is NVFP4 else None
        if scale is None:
            continue
        count = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if scale.shape != (count,) or scale.format.name != "f32":
            raise WeightsError(
                f"{file.path}: {_scale_of(name)} is {scale.format.name} {list(scale.shape)}, "
                f"expected f32 [{count}] beside {name}"
            )
        with scale.path.open("rb") as data:
            data.seek(scale.start)
            found[name] = struct.unpack(f"<{count}f", data.read(4 * count))
        if not all(map(math.isfinite, found[name])) or not any(found[name]):
            raise WeightsError(f"{file.path}: {_scale_of(name)} holds {found[name][:3]}, no scales")
    return found


def _without_predictors(file: GGUFFile) -> GGUFFile:
    """Returns the file without the layers that predict tokens further ahead."""
    reader = Reader(file)
    behind = range(num_layers(reader), reader.size("block_count"))
    layers = {name: _LAYER_OF.match(name) for name in file.tensors}
    kept = [name for name, layer in layers.items() if not (layer and int(layer[1]) in behind)]
    return replace(file, tensors={name: file.tensors[name] for name in kept})


def _halves(file: GGUFFile) -> dict[str, tuple[str, str]]:
    """Returns layer -> names of the keys' and the values' half of what has them in two tensors.

    Raises WeightsError for shapes that are not of one matrix.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, keys in file.tensors.items():
        match = _KEYS_UP.fullmatch(name)
        if match is None:
            continue
        layer = match[1]
        other = f"blk.{layer}.attn_v_b.weight"
        values = file.tensors.get(other)
        if values is None or f"blk.{layer}.attn_kv_b.weight" in file.tensors:
            continue  # refused by its name, as what is missing is
        shapes = keys.shape, values.shape
        if [len(shape) for shape in shapes] != [3, 3] or keys.shape[:2] != values.shape[::2]:
            raise WeightsError(
                f"{file.path}: {name} {list(keys.shape)} and {other} {list(values.shape)} must be "
                "[heads, rank, key size] and [heads, value size, rank]"
            )
        found[layer] = (name, other)
    return found


def _interleaved_heads(file: GGUFFile) -> dict[str, int]:
    """Returns the head counts of the projections whose rows are in ggml's RoPE order."""
    if file.metadata["general.architecture"] != "llama":
        return {}
    heads = file.metadata.get("llama.attention.head_count")
    counts = {
        "attn_q": heads,
        "attn_k": file.metadata.get("llama.attention.head_count_kv", heads),
    }
    for name, tensor in file.tensors.items():
        kind = name.split(".")[2] if name.count(".") == 3 else ""
        count = counts.get(kind)
        if kind in counts and (not isinstance(count, int) or not _splits(tensor, count)):
            raise WeightsError(
                f"{file.path}: {name} has {tensor.shape[0]} rows, which {count!r} heads of even "
                "size cannot share"
            )
    return {kind: count for kind, count in counts.items() if isinstance(count, int)}


def _splits(tensor: GGUFTensor, num_heads: int) -> bool:
    return num_heads > 0 and tensor.shape[0] % (2 * num_heads) == 0


class _Lister:
    """Turns one tensor of a file into one or more under Hugging Face names."""

    def __init__(
        self,
        scales: Mapping[str, tuple[float, ...]],
        files: dict[Path, MappedFile],
        names: ExpertNames,
        layer_names: Mapping[str, str],
        head_counts: dict[str, int],
        norm_offset: float,
    ) -> None:
        self._scales = scales
        self._files = files
        self._names = names
        self._layer_names = layer_names
        self._head_counts = head_counts
        self._norm_offset = norm_offset

    def list(self, name: str, tensor: GGUFTensor) -> Iterator[tuple[str, StoredTensor]]:
        match = _NAME.fullmatch(name)
        if match is None:
            stored = self._stored(tensor, tensor.shape)
            yield _TOP.get(name, name), replace(stored, factor=self._scales.get(name, (1.0,))[0])
            return
        layer, kind, expert, suffix = match.groups()
        if expert is not None and kind in ("ffn_gate", "ffn_up", "ffn_down"):
            full_name = self._names.expert(layer, int(expert), kind.removeprefix("ffn_"))
            yield full_name, self._stored(tensor, tensor.shape)
        elif kind in _STACKED:
            yield from self._experts(name, layer, kind, suffix, tensor)
        elif kind == "ffn_gate_inp":
            full_name = self._names.router(layer).removesuffix("weight") + suffix
            yield full_name, self._stored(tensor, tensor.shape)
        elif kind == "exp_probs_b" and suffix == "bias":
            full_name = self._names.correction(layer)
            yield full_name, self._stored(tensor, tensor.shape)
        elif kind == "attn_sinks":
            yield f"model.layers.{layer}.self_attn.sinks", self._stored(tensor, tensor.shape)
        elif kind in self._layer_names:
            # The gate of the shared expert is one row, which the file keeps as a vector.
            shape = (1, *tensor.shape[-1:]) if kind == "ffn_gate_inp_shexp" else tensor.shape
            full_name = f"model.layers.{layer}.{self._layer_names[kind]}.{suffix}"
            stored = self._stored(tensor, shape, self._head_counts.get(kind, 0))
            yield full_name, replace(stored, factor=self._scales.get(name, (1.0,))[0])
        else:
            yield name, self._stored(tensor, tensor.shape)

    def stored(self, tensor: GGUFTensor) -> StoredTensor:
        """Returns a tensor as the file has it."""
        return self._stored(tensor, tensor.shape)

    def _experts(
        self, name: str, layer: str, kind: str, suffix: str, tensor: GGUFTensor
    ) -> Iterator[tuple[str, StoredTensor]]:
        if len(tensor.shape) != (3 if suffix == "weight" else 2):
            wanted = "[experts, rows, cols]" if suffix == "weight" else "[experts, rows]"
            raise WeightsError(f"{name} must be {wanted}, got {list(tensor.shape)}")
        num_experts, rows, *cols = tensor.shape
        parts = kind.removeprefix("ffn_").removesuffix("_exps").split("_")
        if rows % len(parts):
            raise WeightsError(f"{name} has {rows} rows, which gate and up cannot share")
        part_rows = rows // len(parts)
        shape = (part_rows, *cols)
        factors = self._scales.get(name, (1.0,) * num_experts)
        part_bytes = math.prod(shape[:-1]) * tensor.format.row_bytes(shape[-1])
        for expert in range(num_experts):
            for index, part in enumerate(parts):
                offset = (expert * len(parts) + index) * part_bytes
                full_name = self._names.expert(layer, expert, part, kind=suffix)
                stored = self._stored(tensor, shape, offset=offset)
                yield full_name, replace(stored, factor=factors[expert])

    def _stored(
        self,
        tensor: GGUFTensor,
        shape: tuple[int, ...],
        interleaved_heads: int = 0,
        offset: int = 0,
    ) -> StoredTensor:
        return StoredTensor(
            file=self._files[tensor.path],
            start=tensor.start + offset,
            shape=shape,
            format=tensor.format,
            format_name=tensor.format.name,
            interleaved_heads=interleaved_heads,
            added=self._norm_offset if len(shape) == 1 else 0.0,
        )
