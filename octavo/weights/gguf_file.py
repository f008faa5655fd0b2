"""Reads the header of GGUF files: metadata, and where which tensor lies. No torch.

Called by `gguf_config`, `gguf_source` and `gguf_tokenizer`. Never reads tensor data. It reads a
vocabulary of 49,152 tokens in 0.1 s; gguf.GGUFReader makes an array of every token, in 4.6 s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.formats import GGUF_FORMATS, WeightFormat

_SCALARS = {
    kind: struct.Struct("<" + code)
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
TENSOR_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "bf16": 30,
    "tq1_0": 34,
    "tq2_0": 35,
    "mxfp4": 39,
    "nvfp4": 40,
}
"""ggml's numbers of the formats that we know; the package gguf, which has all, takes 0.1 s."""
_FORMATS = {TENSOR_TYPES[name]: number_format for name, number_format in GGUF_FORMATS.items()}
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_COUNT = "split.count"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """One tensor; `shape` is row-major, as in torch ([E, rows, cols] for stacked experts)."""

    path: Path
    start: int
    """Byte in the file."""
    shape: tuple[int, ...]
    format: WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFile:
    """The header of a model, of all its parts if it is split over several files."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, strings, and lists of numbers."""
    tensors: dict[str, GGUFTensor]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(tensor.path for tensor in self.tensors.values()))


def read_gguf(path: Path) -> GGUFFile:
    """Returns the header of the model in `path` (any part of a split model).

    Raises WeightsError for a broken file (naming the tensor that is cut off), UnsupportedModelError
    for tensor types that Octavo does not know.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        metadata, tensors = _read_part(path, 1)
        return GGUFFile(path=path, metadata=metadata, tensors=tensors)
    total = int(match[3])
    parts = [path.with_name(f"{match[1]}-{n:05}-of-{total:05}.gguf") for n in range(1, total + 1)]
    merged: tuple[dict[str, Any], dict[str, GGUFTensor]] = ({}, {})
    for part in parts:
        metadata, tensors = _read_part(part, total)
        if twice := sorted(tensors.keys() & merged[1].keys()):
            first = merged[1][twice[0]].path.name
            raise WeightsError(f"{twice[0]} is both in {first} and in {part.name}")
        merged[0].update({k: v for k, v in metadata.items() if k not in merged[0]})
        merged[1].update(tensors)
    return GGUFFile(path=path, metadata=merged[0], tensors=merged[1])


def _read_part(path: Path, total: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Returns metadata and tensors of a file, which must be one of `total` if it is a part."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            metadata, tensors = _Header(path, data).read()
    except FileNotFoundError as error:
        raise WeightsError(f"weights file {path} does not exist") from error
    except (struct.error, ValueError, OverflowError, OSError) as error:
        raise WeightsError(f"{path} is truncated or corrupt in its header: {error}") from error
    if metadata.get(_COUNT, 0) not in (0, total):
        raise WeightsError(
            f"{path} is one of {metadata[_COUNT]} parts, as its {_COUNT} says: let them have the "
            "names that they were made with, which end in -00001-of- and their number"
        )
    return metadata, tensors


class _Header:
    """One pass over the header of one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic, version = self._data[:4], struct.unpack_from("<I", self._data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise UnsupportedModelError(
                f"{self._path} starts with {magic!r} and version {version}; known are "
                "little-endian GGUF files of versions 2 and 3"
            )
        self._position = 8
        num_tensors, num_values = self._scalar(_U64), self._scalar(_U64)
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._scalar(_U32))
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data_start = -(-self._position // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"{name} is there twice")
            tensors[name] = self._tensor(name, shape, kind, data_start + offset)
        return metadata, tensors

    def _scalar(self, kind: struct.Struct) -> Any:
        value = kind.unpack_from(self._data, self._position)[0]
        self._position += kind.size
        return value

    def _string(self) -> str:
        length = self._scalar(_U64)
        start = self._position
        self._position += length
        if self._position > len(self._data):
            raise ValueError(f"a text at byte {start} has {length} bytes, more than the file")
        return self._data[start : self._position].decode("utf-8")

    def _strings(self, count: int) -> list[str]:
        """As `_string`, of a vocabulary: in a loop without calls of ours."""
        data, position, length_at = self._data, self._position, _U64.unpack_from
        texts: list[str] = []
        for _ in range(count):
            start = position + 8
            position = start + length_at(data, position)[0]
            texts.append(data[start:position].decode())
        self._position = position
        if position > len(data):
            raise ValueError(f"{count} texts end at byte {position}, beyond the file")
        return texts

    def _value(self, kind: int) -> Any:
        """Returns a number, a text, or a list of either."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"unknown value type {kind} at byte {self._position}")
            return self._scalar(_SCALARS[kind])
        item_kind, length = self._scalar(_U32), self._scalar(_U64)
        if item_kind in _SCALARS:
            items = struct.Struct(f"<{length}{_SCALARS[item_kind].format[1:]}")
            values = list(items.unpack_from(self._data, self._position))
            self._position += items.size
            return values
        if item_kind != _STRING:
            raise ValueError(f"unknown item type {item_kind} at byte {self._position}")
        return self._strings(length)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, row-major shape, ggml type and offset of one tensor."""
        name = self._string()
        num_dimensions = self._scalar(_U32)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar(_U64) for _ in range(num_dimensions))[::-1]
        return name, shape, self._scalar(_U32), self._scalar(_U64)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        number_format = _FORMATS.get(kind)
        if number_format is None:
            import gguf

            names = {int(known): known.name for known in gguf.GGMLQuantizationType}
            raise UnsupportedModelError(
                f"{self._path}: {name} has the tensor type {names.get(kind, kind)}; known are "
                f"{', '.join(known.name.upper() for known in _FORMATS.values())}"
            )
        if min(shape) < 1 or shape[-1] % number_format.block_size:
            raise WeightsError(
                f"{self._path}: {name} of shape {list(shape)} cannot be {number_format.name}"
            )
        end = start + math.prod(shape[:-1]) * number_format.row_bytes(shape[-1])
        if end > len(self._data):
            raise WeightsError(
                f"{self._path} is truncated: {name} ends at byte {end}, the file has "
                f"{len(self._data)}; download the model again"
            )
        return GGUFTensor(path=self._path, start=start, shape=shape, format=number_format)
