"""Planes stand for the values that packed rows do."""

from __future__ import annotations

import pytest
import torch

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import planes_of, values_of
from octavo.kernels.weights import Weight
from octavo.planes import FP8_ROW, PLANE_LAYOUTS, PlaneLayout

COLUMNS = {"fp8_row": 256}


def rows_of(layout: PlaneLayout, name: str, cols: int) -> Weight:
    """Returns random rows in the format called `name`, with scales that are small numbers."""
    form = WEIGHT_FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (3, form.row_bytes(cols)), dtype=torch.uint8, generator=generator)
    blocks = data.view(3, -1, form.block_bytes)
    if layout.values == "e4m3":
        blocks[..., 4:] &= 0xBF  # no NaN
    width = {"f16": 2, "bf16": 2, "f32": 4, "e8m0": 1}[layout.scale]
    if layout.scale == "e8m0":
        blocks[..., 0] = blocks[..., 0] % 16 + 120
    else:
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[layout.scale]
        count = 2 if layout.offset == "min" else 1
        scales = torch.rand(*blocks.shape[:2], count, generator=generator)
        scales = scales[:, :1].expand_as(scales) if layout is FP8_ROW else scales
        scales = scales.to(dtype).contiguous()
        blocks[..., : width * count] = scales.view(torch.uint8).view(*blocks.shape[:2], -1)
    return Weight(data=data, format=form, rows=3, cols=cols)


@pytest.mark.parametrize("name", list(PLANE_LAYOUTS))
def test_planes_mean_what_the_rows_meant(name: str):
    layout = PLANE_LAYOUTS[name]
    for cols in (64, 160, 384):
        weight = rows_of(layout, "fp8" if layout is FP8_ROW else name, cols)
        planes = planes_of(layout, weight.data, weight.format.block_bytes, cols)
        found = values_of(layout, planes, cols)
        assert torch.allclose(found, dequantize_rows(weight, slice(0, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4_64_f16", "int8_128", "fp8", "fp8_row"])
def test_columns_are_cut_at_whole_steps(name: str):
    layout, cols = PLANE_LAYOUTS[name], 512
    weight = rows_of(layout, "fp8" if layout is FP8_ROW else name, cols)
    planes = planes_of(layout, weight.data, weight.format.block_bytes, cols)
    whole = values_of(layout, planes, cols)
    part = values_of(layout, planes.columns(layout, 256, 512), 256)
    assert torch.equal(part, whole[:, 256:])
