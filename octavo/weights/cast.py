"""Gives the weights of files in a number format of choice.

Made by `loader` for any `dtype` but "auto". Converts one tensor at a time, when it is asked for;
never keeps what it returned.
"""

from __future__ import annotations

import math

from torch import Tensor

from octavo.formats import WEIGHT_FORMATS, WeightFormat
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout
from octavo.weights.large_pages import LargePages
from octavo.weights.published.source import PackedSource
from octavo.weights.source import DTYPE_FORMATS, NUMBER_DTYPES, MappedSource, part_of
from octavo.weights.staging import Staging

_CHUNK_ELEMENTS = 1 << 22
"""Block formats are unpacked in pieces: NumPy needs several float32 copies of each."""


class CastSource:
    """A TensorSource whose matrices are all in `dtype` (float32, float16 or bfloat16)."""

    def __init__(self, source: MappedSource | PackedSource, dtype: str) -> None:
        self._source = source
        self._format = WEIGHT_FORMATS[DTYPE_FORMATS[dtype]]
        self._memory = LargePages()

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def format(self, name: str) -> WeightFormat:
        return self._format

    def device_format(self, name: str) -> WeightFormat:
        return self._format

    def matrix(self, name: str) -> Weight:
        weight = self._source.matrix(name)
        if weight.format == self._format:
            return weight
        data = self._memory.empty((weight.rows, weight.cols), NUMBER_DTYPES[self._format.name])
        convert_into(data, weight)
        self._source.release(name)
        return Weight(data=data, format=self._format, rows=weight.rows, cols=weight.cols)

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        if self._source.format(name).is_block:
            out.copy_(part_of(self.matrix(name).data, out, row, col))
        else:
            self._source.copy_into(name, out, staging, row, col)

    def order(self, name: str) -> Tensor | None:
        return None

    def layout(self, name: str) -> PlaneLayout | None:
        return None

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        raise AssertionError(f"{name} is numbers")

    def vector(self, name: str) -> Tensor:
        return self._source.vector(name)

    @property
    def nbytes(self) -> int:
        elements = sum(math.prod(self._source.shape(name)) for name in self._source.names())
        return elements * self._format.block_bytes


def convert_into(out: Tensor, weight: Weight) -> None:
    """Writes the values of `weight` to `out` [rows, cols], in its dtype."""
    if not weight.format.is_block:
        out.copy_(weight.data)
        return
    step = max(1, _CHUNK_ELEMENTS // weight.cols)
    for start in range(0, weight.rows, step):
        rows = slice(start, start + step)
        out[rows] = dequantize_rows(weight, rows)
