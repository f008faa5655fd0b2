"""A GGUF file's tensors where latent attention's kv_b is in two, its keys transposed.

Made by `gguf_source`. Joins the two when the matrix is asked for; never keeps what it returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS, WeightFormat
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.weights import Weight
from octavo.weights.source import NUMBER_DTYPES, MappedSource, StoredTensor, part_of
from octavo.weights.staging import Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitUp:
    """kv_b as two stacks of a matrix a head."""

    keys: StoredTensor
    """[H, rank, nope]: each head's is transposed."""
    values: StoredTensor
    """[H, value, rank]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of kv_b: [H * (nope + value), rank]."""
        heads, rank, nope = self.keys.shape
        return heads * (nope + self.values.shape[1]), rank

    @property
    def format(self) -> WeightFormat:
        """That of both if they are numbers alike, else float32, in which blocks are exact."""
        form = self.keys.format
        is_kept = form is not None and form == self.values.format and not form.is_block
        return form if is_kept and form is not None else WEIGHT_FORMATS["f32"]

    @property
    def device_format(self) -> WeightFormat:
        forms = self.keys.format, self.values.format
        has_blocks = any(form is not None and form.is_block for form in forms)
        return WEIGHT_FORMATS["bf16"] if has_blocks else self.format

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.format.block_bytes

    def joined(self) -> Tensor:
        """Returns kv_b, each head's keys before its values."""
        heads = torch.cat((_numbers(self.keys).transpose(1, 2), _numbers(self.values)), dim=1)
        return heads.to(NUMBER_DTYPES[self.format.name]).view(self.shape)

    def release(self) -> None:
        for stored in (self.keys, self.values):
            stored.file.release(stored.start, stored.nbytes)


class LatentSource(MappedSource):
    """The tensors of the file, and what is joined of two of them."""

    def __init__(self, tensors: Mapping[str, StoredTensor], ups: Mapping[str, SplitUp]) -> None:
        super().__init__(tensors)
        self._ups = dict(ups)

    def names(self) -> frozenset[str]:
        return super().names() | self._ups.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        up = self._ups.get(name)
        return super().shape(name) if up is None else up.shape

    def format(self, name: str) -> WeightFormat:
        up = self._ups.get(name)
        return super().format(name) if up is None else up.format

    def device_format(self, name: str) -> WeightFormat:
        """Blocks become what a GPU makes of codes wherever it multiplies with them."""
        up = self._ups.get(name)
        return super().device_format(name) if up is None else up.device_format

    def matrix(self, name: str) -> Weight:
        up = self._ups.get(name)
        if up is None:
            return super().matrix(name)
        rows, cols = up.shape
        weight = Weight(data=up.joined(), format=up.format, rows=rows, cols=cols)
        up.release()
        return weight

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        if name in self._ups:
            out.copy_(part_of(self.matrix(name).data, out, row, col))
        else:
            super().copy_into(name, out, staging, row, col)

    def release(self, name: str) -> None:
        up = self._ups.get(name)
        if up is None:
            super().release(name)
        else:
            up.release()

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(up.nbytes for up in self._ups.values())


def _numbers(stored: StoredTensor) -> Tensor:
    """Returns the float32 numbers of a stack."""
    *rows, cols = stored.shape
    flat = replace(stored, shape=(math.prod(rows), cols))
    weight = MappedSource({"": flat}).matrix("")
    return dequantize_rows(weight, slice(None)).view(stored.shape)
