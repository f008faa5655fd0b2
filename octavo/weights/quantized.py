"""Weights quantised when they are loaded: `--quantization fp8|int8|int4` of a model that is not.

Made by `loader`, around a source of numbers. One matrix at a time, on the device that it goes to.
Embeddings, heads, routers and what cannot be split into groups stay numbers.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.formats import FP8, WeightFormat
from octavo.kernels.planes import Planes, pack_codes
from octavo.kernels.weights import Weight
from octavo.planes import FP8_ROW, PlaneLayout, plane_layout
from octavo.weights.dummy import DummySource
from octavo.weights.made import LoadQuantization, load_quantization, made_format
from octavo.weights.published.repack import fp8_rows, int4_rows, int8_rows
from octavo.weights.random_blocks import random_weight
from octavo.weights.random_planes import fill_random
from octavo.weights.source import TensorSource
from octavo.weights.staging import Staging

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LARGEST_E4M3 = 448.0
_DUMMY_BOUND = 2e-3


class Codes(NamedTuple):
    """Quantised rows: value = (code - zero) * scale, or e4m3 * scale."""

    codes: Tensor
    """uint8 [R, K]; of fp8 the bytes of e4m3."""
    scales: Tensor
    """float32 [R, G]."""


def quantize(values: Tensor, kind: LoadQuantization) -> Codes:
    """Returns the codes nearest to float [R, K], each group of 128 columns (fp8: each row) scaled
    so that its largest number is the largest of the codes."""
    values = values.float()
    rows, cols = values.shape
    if kind == "fp8":
        scales = values.abs().amax(1, keepdim=True).clamp_(min=1e-12) / _LARGEST_E4M3
        return Codes((values / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales)
    group, centre = 128, 8 if kind == "int4" else 128
    missing = -cols % group
    groups = torch.nn.functional.pad(values, (0, missing)).view(rows, -1, group)
    scales = groups.abs().amax(2).clamp_(min=1e-12) / (centre - 1)
    if kind == "int4":
        scales = scales.to(torch.float16).clamp_(min=2.0**-24).float()
    codes = (groups / scales[..., None]).round_().clamp_(1 - centre, centre - 1) + centre
    return Codes(codes.flatten(1)[:, :cols].to(torch.uint8), scales)


class QuantizedSource:
    """A TensorSource whose matrices are quantised, but for those that stay as they are."""

    def __init__(self, source: TensorSource, kind: str) -> None:
        """`kind`: see `octavo.weights.made`; not all of them can be made of numbers."""
        self._source = source
        self._kind = kind
        layers = (_LAYER.match(name) for name in source.names())
        self._num_layers = 1 + max((int(found[1]) for found in layers if found), default=-1)

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def format(self, name: str) -> WeightFormat:
        return self._made(name) or self._source.format(name)

    def device_format(self, name: str) -> WeightFormat:
        return self._made(name) or self._source.device_format(name)

    def matrix(self, name: str) -> Weight:
        form, kind = self._made(name), load_quantization(self._kind)
        if form is None:
            return self._source.matrix(name)
        if kind is None:
            assert isinstance(self._source, DummySource)
            generator = self._source.generator(name, torch.device("cpu"))
            rows, cols = self.shape(name)
            return random_weight(form, rows, cols, _DUMMY_BOUND, generator)
        weight = self._source.matrix(name)
        codes, scales = quantize(weight.data, kind)
        if kind == "fp8":
            wide = scales.expand(-1, -(-weight.cols // FP8.block_size))
            data = fp8_rows(codes.view(torch.float8_e4m3fn), wide)
        else:
            zeros = torch.full(scales.shape, 8 if kind == "int4" else 128, dtype=torch.uint8)
            pack = int4_rows if kind == "int4" else int8_rows
            of_format = scales.half() if kind == "int4" else scales
            data = pack(codes, of_format, zeros, form)
        return Weight(data=data, format=form, rows=weight.rows, cols=weight.cols)

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        self._source.copy_into(name, out, staging, row, col)

    def order(self, name: str) -> Tensor | None:
        return self._source.order(name)

    def layout(self, name: str) -> PlaneLayout | None:
        form = self._made(name)
        if form is None:
            return self._source.layout(name)
        return FP8_ROW if self._kind == "fp8" else plane_layout(form.name)

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        layout, device = self.layout(name), out.codes.device
        assert layout is not None
        if isinstance(self._source, DummySource):
            fill_random(layout, out, _DUMMY_BOUND, self._source.generator(name, device))
            return
        kind = load_quantization(self._kind)
        assert kind is not None
        width = self.shape(name)[1]
        numbers = torch.empty((len(out.codes), width), dtype=torch.float32, device=device)
        self._source.copy_into(name, numbers, staging, row, 0)
        codes, scales = quantize(numbers, kind)
        codes = torch.nn.functional.pad(codes, (0, layout.padded(width) - width))
        zero = 8 if kind == "int4" else 128
        offsets = torch.full(scales.shape, zero, dtype=torch.uint8, device=device)
        offsets = offsets if layout.offset == "zero" else offsets[:, :0]
        words = pack_codes(layout, codes)
        made = Planes(words, scales.to(out.scales.dtype), offsets, words[:, :0], scales[:, :0])
        for plane, part in zip(out, made.columns(layout, cols.start, cols.stop), strict=True):
            plane.copy_(part)

    def vector(self, name: str) -> Tensor:
        return self._source.vector(name)

    @property
    def nbytes(self) -> int:
        sizes = ((name, self.shape(name)) for name in self.names())
        return sum(self.format(name).row_bytes(s[-1]) * math.prod(s[:-1]) for name, s in sizes)

    def _made(self, name: str) -> WeightFormat | None:
        return made_format(self._kind, name, self._source.shape(name), self._num_layers)
