"""Reads safetensors checkpoints: lists the tensors of one file, or of the shards of an index.

Called by `loader`. Never reads tensor data: MappedSource does, when a model asks.
Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from octavo.errors import WeightsError
from octavo.formats import WEIGHT_FORMATS
from octavo.weights.checkpoint import weight_files
from octavo.weights.names import expert_names, text_name
from octavo.weights.published.source import PackedSource, packed_source
from octavo.weights.published.tensors import RAW_DTYPES
from octavo.weights.quantization import Quantization
from octavo.weights.source import MappedFile, MappedSource, StoredTensor
from octavo.weights.stacked import as_stacked, experts_of

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_MAX_HEADER_BYTES = 100_000_000


def open_safetensors(
    folder: Path, model_type: str, quantization: Quantization | None = None
) -> MappedSource | PackedSource:
    """Returns the tensors of a checkpoint folder under their usual names.

    Experts in stacks are listed one by one, and the text model of one that also sees without its
    prefix. Raises WeightsError naming the broken file and, where known, the tensor.
    """
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, one in _read_header(path).items():
            _add(stored, text_name(name), one)
    names = as_stacked(expert_names(model_type), stored)
    if quantization:  # what experts a quantised stack has, its scales tell too
        return packed_source(stored, names, quantization)
    tensors: dict[str, StoredTensor] = {}
    for whole in stored.items():
        for name, one in experts_of(*whole, names):
            _add(tensors, name, one)
    return MappedSource(tensors)


def _add(tensors: dict[str, StoredTensor], name: str, one: StoredTensor) -> None:
    if name in tensors:
        first = tensors[name].file.path.name
        raise WeightsError(f"{name} is both in {first} and in {one.file.path.name}")
    tensors[name] = one


def _read_header(path: Path) -> dict[str, StoredTensor]:
    file = MappedFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if len(file) < 8 or length > min(_MAX_HEADER_BYTES, len(file) - 8):
        raise WeightsError(
            f"{path} is truncated or no safetensors file: it has {len(file)} bytes, its header "
            f"says {length}"
        )
    try:
        header = json.loads(file.read(8, length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path} has a corrupt header: {error}") from error
    return {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}


def _stored(file: MappedFile, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file.path}: the entry of {name} is corrupt: {error!r}") from error
    if not 0 <= begin <= end or data_start + end > len(file):
        raise WeightsError(
            f"{file.path} is truncated: {name} ends at byte {data_start + end}, the file has "
            f"{len(file)}; download the model again"
        )
    number_format = WEIGHT_FORMATS[_DTYPES[dtype]] if dtype in _DTYPES else None
    if number_format and min(shape, default=1) < 1:
        raise WeightsError(f"{file.path}: {name} has the shape {list(shape)}")
    item_bytes = RAW_DTYPES[dtype].itemsize if dtype in RAW_DTYPES else None
    if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
        raise WeightsError(
            f"{file.path}: {name} of shape {list(shape)} in {dtype} cannot have {end - begin} bytes"
        )
    return StoredTensor(
        file=file,
        start=data_start + begin,
        shape=shape,
        format=number_format,
        format_name=dtype,
    )
