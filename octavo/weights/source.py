"""The seam between placements and weights files: a TensorSource, and the one that maps files.

Placements read weights through TensorSource alone, under Hugging Face checkpoint names. `matrix`
never copies, except where a file keeps its rows in another order than the models expect.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.formats import WEIGHT_FORMATS, WeightFormat
from octavo.kernels.dequantize import gguf_table
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout, plane_layout
from octavo.weights.laid_out import copy_packed, lay_out, pieces
from octavo.weights.staging import STAGING_BYTES, Staging

NUMBER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Torch dtypes of the formats that are no blocks."""
DTYPE_FORMATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Format names of the dtypes that a user or a config.json can name."""


class TensorSource(Protocol):
    """Weights by Hugging Face name, one matrix per expert, whatever the file looks like."""

    def names(self) -> frozenset[str]:
        """Returns the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns [rows, cols] or [length]. Raises WeightsError if there is no such tensor."""
        ...

    def format(self, name: str) -> WeightFormat:
        """Returns the format that `matrix` has. Raises UnsupportedModelError on an unknown one."""
        ...

    def matrix(self, name: str) -> Weight:
        """Returns a 2-D tensor, as a view of the file where the source can. Do not write to it."""
        ...

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        """Fills `out`, contiguous and on any device, from the matrix at [row, col] on.

        Numbers are rounded to out's dtype; of block formats `out` gets the bytes. Copies may
        still be on their way when this returns. Threads may call it at once, each with its own
        `staging`.
        """
        ...

    def device_format(self, name: str) -> WeightFormat:
        """Returns the format that a GPU has a matrix in for which there is no layout: that of
        `matrix`, but for what is float32 only to be exact on the host."""
        ...

    def order(self, name: str) -> Tensor | None:
        """Returns the `Weight.order` of a matrix, on the host; None for most."""
        ...

    def layout(self, name: str) -> PlaneLayout | None:
        """Returns how a device lays out the matrix, None for numbers and for what it cannot keep
        packed."""
        ...

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        """Fills `out`, planes of the matrix's layout on any device, from row `row` on, with columns
        that begin and end with steps of the layout or with the row. Threads may call it at once."""
        ...

    def vector(self, name: str) -> Tensor:
        """Returns a 1-D tensor, or a lone number as one, as a float32 copy."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as `matrix` returns them."""
        ...


class MappedFile:
    """A weights file in memory: pages are read on first use and belong to the page cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Private and writable only because torch warns about read-only buffers; a page
                # that nobody writes to is never copied.
                self._map = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
                # mmap keeps a descriptor too, but does not tell it.
                self._descriptor = os.dup(file.fileno())
        except FileNotFoundError as error:
            raise WeightsError(f"weights file {path} does not exist") from error
        except (OSError, ValueError) as error:
            raise WeightsError(f"weights file {path} cannot be mapped: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, length: int) -> bytes:
        """Returns a copy of bytes [start, start + length), fewer at the end of the file."""
        return self._map[start : start + length]

    def view(self, start: int, length: int) -> Tensor:
        """Returns a uint8 view; the mapping lives as long as a view of it does."""
        return torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start)

    def read_into(self, start: int, out: Tensor) -> None:
        """Fills `out` (uint8, host) from byte `start` on, mapping no page; any thread may call."""
        rest = out.numpy().data
        while rest:
            length = os.preadv(self._descriptor, [rest], start)
            if length == 0:
                raise WeightsError(
                    f"{self.path} ended at byte {start} while it was read; was it replaced?"
                )
            rest, start = rest[length:], start + length

    def release(self, start: int, length: int) -> None:
        """Drops the whole pages inside [start, start + length) from this process."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsOf:
    """The matrix whose rows are some columns of a stored one: first, first + step, ..."""

    rows: int
    cols: int
    """Of the stored matrix."""
    first: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor, or one expert of a stacked tensor, lies in a file."""

    file: MappedFile
    start: int
    """Byte of its first row; rows follow each other without gaps."""
    shape: tuple[int, ...]
    format: WeightFormat | None
    """None: a number format that Octavo cannot compute with."""
    format_name: str
    """As the file says, for error messages."""
    interleaved_heads: int = 0
    """Above 0: the rows of each of so many heads pair neighbours for RoPE (ggml's order for
    `llama`), and are returned in the half-split order."""
    added: float = 0.0
    """What the file adds to the numbers of a vector; it is taken off again."""
    factor: float = 1.0
    """What the file multiplies the numbers of a matrix with, in a format that has scales in its
    table."""
    columns: ColumnsOf | None = None
    """The tensor is not stored in one piece, but as columns of the matrix that begins at `start`;
    numbers alone."""

    @property
    def nbytes(self) -> int:
        if self.format is None:
            return 0
        *rows, cols = self.shape or (1,)
        return self.format.row_bytes(cols) * math.prod(rows)


class MappedSource:
    """The TensorSource over mapped files; what the formats differ in is how they list tensors."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def format(self, name: str) -> WeightFormat:
        return _format_of(name, self._find(name))

    def device_format(self, name: str) -> WeightFormat:
        return self.format(name)

    def order(self, name: str) -> Tensor | None:
        return None

    def matrix(self, name: str) -> Weight:
        stored = self._find(name)
        if len(stored.shape) != 2:
            raise WeightsError(f"{name} is no matrix: its shape is {list(stored.shape)}")
        number_format = _format_of(name, stored)
        rows, cols = stored.shape
        data = _rows(stored, number_format, rows)
        if stored.interleaved_heads:
            data = half_split_rows(data, stored.interleaved_heads)
            stored.file.release(stored.start, stored.nbytes)
        table = _table(stored, number_format)
        return Weight(data=data, format=number_format, rows=rows, cols=cols, table=table)

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        stored = self._find(name)
        number_format = _format_of(name, stored)
        if stored.interleaved_heads or stored.columns is not None:
            first = number_format.row_bytes(col) if number_format.is_block else col
            out.copy_(part_of(self.matrix(name).data, out, row, first))
            return
        # Read rather than mapped: no page faults, and no mapped pages to give back.
        row_bytes = number_format.row_bytes(stored.shape[1])
        for piece in out.split(STAGING_BYTES // row_bytes):
            data = staging.take()[: len(piece) * row_bytes]
            stored.file.read_into(stored.start + row * row_bytes, data)
            first = col
            if number_format.is_block:
                first = number_format.row_bytes(col)
            else:
                data = data.view(NUMBER_DTYPES[number_format.name])
            part = part_of(data.view(len(piece), -1), piece, 0, first)
            piece.copy_(part, non_blocking=True)
            staging.sent()
            row += len(piece)

    def layout(self, name: str) -> PlaneLayout | None:
        return plane_layout(self.format(name).name)

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        layout, stored = self.layout(name), self._find(name)
        assert layout is not None
        form = _format_of(name, stored)
        if stored.interleaved_heads:
            copy_packed(self.matrix(name), layout, out, row, cols)
            self.release(name)
            return
        row_bytes, table = form.row_bytes(stored.shape[1]), _table(stored, form)
        for rows in pieces(out, stored.shape[1]):
            start = stored.start + (row + rows.start) * row_bytes
            data = staging.fetch(stored.file, start, len(rows) * row_bytes).view(len(rows), -1)
            with staging.converting:
                part = out.rows(rows.start, rows.stop)
                lay_out(data, form, layout, stored.shape[1], table, part, cols)

    def vector(self, name: str) -> Tensor:
        stored = self._find(name)
        number_format = _format_of(name, stored)
        if len(stored.shape) > 1 or number_format.is_block:
            raise WeightsError(
                f"{name} is no vector of numbers: its shape is {list(stored.shape)}, its format "
                f"{stored.format_name}"
            )
        data = _rows(stored, number_format, 1).reshape(-1, 1)
        if stored.interleaved_heads:
            data = half_split_rows(data, stored.interleaved_heads)
        numbers = data.flatten().to(torch.float32, copy=True)
        return numbers.sub_(stored.added) if stored.added else numbers

    def release(self, name: str) -> None:
        """Gives the tensor's pages back to the system after its values were copied elsewhere.

        Views stay valid: reading them again reads the file again.
        """
        stored = self._find(name)
        stored.file.release(stored.start, stored.nbytes)

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self._tensors.values())

    def _find(self, name: str) -> StoredTensor:
        found = self._tensors.get(name)
        if found is None:
            raise WeightsError(f"tensor {name} is missing from the weights")
        return found


def part_of(data: Tensor, out: Tensor, row: int, col: int) -> Tensor:
    """Returns the view of `data` from [row, col] on that has the shape of `out`."""
    return data[row : row + out.shape[0], col : col + out.shape[1]]


def half_split_rows(data: Tensor, num_heads: int, first: int = 0) -> Tensor:
    """Returns the rows of each head with the first of every RoPE pair before all the second; those
    before `first` stay where they are."""
    rows, width = data.shape
    heads = data.view(num_heads, rows // num_heads, width)
    pairs = heads[:, first:].unflatten(1, (-1, 2)).transpose(1, 2)
    return torch.cat((heads[:, :first], pairs.flatten(1, 2)), dim=1).view(rows, width)


def _format_of(name: str, stored: StoredTensor) -> WeightFormat:
    if stored.format is None:
        known = ", ".join(WEIGHT_FORMATS)
        raise UnsupportedModelError(
            f"{name} in {stored.file.path} has the number format {stored.format_name}; known are "
            f"{known}"
        )
    return stored.format


def _table(stored: StoredTensor, form: WeightFormat) -> Tensor | None:
    table = gguf_table(form)
    return table if table is None or stored.factor == 1.0 else table * stored.factor


def _columns(stored: StoredTensor, columns: ColumnsOf, number_format: WeightFormat) -> Tensor:
    whole = replace(stored, shape=(columns.rows, columns.cols), columns=None)
    data = _rows(whole, number_format, columns.rows)[:, columns.first :: columns.step]
    numbers = data[:, : stored.shape[0]].T.contiguous()
    stored.file.release(whole.start, whole.nbytes)
    return numbers


def _rows(stored: StoredTensor, number_format: WeightFormat, rows: int) -> Tensor:
    """Returns a view [rows, cols], or [rows, row bytes] for block formats; a copy of columns."""
    if stored.columns is not None:
        return _columns(stored, stored.columns, number_format).view(rows, -1)
    data = stored.file.view(stored.start, stored.nbytes)
    if not number_format.is_block:
        if stored.start % number_format.block_bytes:
            data = data.clone()  # a header of odd length: numbers must start at their own size
        data = data.view(NUMBER_DTYPES[number_format.name])
    return data.view(rows, -1)
