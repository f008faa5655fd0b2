"""Planes stand for the values that packed rows do."""

from __future__ import annotations

import pytest
import torch

from octavo.formats import GGUF_FORMATS, WEIGHT_FORMATS
from octavo.kernels.block_rows import planes_of
from octavo.kernels.dequantize import dequantize_rows, gguf_table
from octavo.kernels.planes import empty_planes, values_of
from octavo.kernels.weights import Weight
from octavo.planes import FP8_ROW, PLANE_LAYOUTS, PlaneLayout

HALVES = {
    **dict.fromkeys(("q5_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("q5_1", "q4_k", "q5_k"), (0, 2)),
    **{"q6_k": (208,), "q2_k": (80, 82), "q3_k": (108,)},
}
"""Where blocks have numbers in float16, if not as their layouts' scales say."""


def rows_of(layout: PlaneLayout, name: str, cols: int) -> Weight:
    """Returns random rows in the format called `name`, with scales that are small numbers."""
    form = WEIGHT_FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (3, form.row_bytes(cols)), dtype=torch.uint8, generator=generator)
    blocks = data.view(3, -1, form.block_bytes)
    if layout.values == "e4m3":
        blocks[..., 4:] &= 0xBF  # no NaN
    width = {"f16": 2, "bf16": 2, "f32": 4}.get(layout.scale, 0)
    if layout.scale == "e8m0":
        blocks[..., 0] = blocks[..., 0] % 16 + 120
    elif name in HALVES:
        for at in HALVES[name]:
            halves = torch.rand(*blocks.shape[:2], 1, generator=generator).half()
            blocks[..., at : at + 2] = halves.view(torch.uint8)
    elif name != "nvfp4":
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[layout.scale]
        count = 2 if layout.offset == "min" else 1
        scales = torch.rand(*blocks.shape[:2], count, generator=generator)
        scales = scales[:, :1].expand_as(scales) if layout is FP8_ROW else scales
        scales = scales.to(dtype).contiguous()
        blocks[..., : width * count] = scales.view(torch.uint8).view(*blocks.shape[:2], -1)
    return Weight(data=data, format=form, rows=3, cols=cols, table=gguf_table(form))


@pytest.mark.parametrize("name", list(PLANE_LAYOUTS))
def test_planes_mean_what_the_rows_meant(name: str):
    layout = PLANE_LAYOUTS[name]
    for cols in (256, 1280) if layout.factor == "block" else (64, 160, 384):
        if name == "nvfp4" and cols % 64:
            continue
        weight = rows_of(layout, "fp8" if layout is FP8_ROW else name, cols)
        block_bytes = weight.format.block_bytes
        planes = planes_of(layout, weight.data, block_bytes, cols, weight.table)
        found, expected = values_of(layout, planes, cols), dequantize_rows(weight, slice(0, 3))
        if name in GGUF_FORMATS:
            assert torch.equal(found, expected)
        else:
            assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        for plane, empty in zip(
            planes, empty_planes(layout, 3, cols, weight.data.device), strict=True
        ):
            assert plane.shape == empty.shape
            assert plane.dtype == empty.dtype or plane.numel() == 0


@pytest.mark.parametrize("name", list(PLANE_LAYOUTS))
def test_planes_take_five_percent_more_than_blocks_at_most(name: str):
    layout = PLANE_LAYOUTS[name]
    form = WEIGHT_FORMATS["fp8" if layout is FP8_ROW else name]
    assert layout.row_bytes(4096) <= 1.05 * form.row_bytes(4096)
    made = empty_planes(layout, 2, 4096, torch.device("cpu"))
    assert sum(plane.nbytes for plane in made) == 2 * layout.row_bytes(4096)


@pytest.mark.parametrize("name", ["int4_64_f16", "int8_128", "fp8", "fp8_row", "q5_k", "q2_k"])
def test_columns_are_cut_at_whole_steps(name: str):
    layout, cols = PLANE_LAYOUTS[name], 512
    weight = rows_of(layout, "fp8" if layout is FP8_ROW else name, cols)
    planes = planes_of(layout, weight.data, weight.format.block_bytes, cols)
    whole = values_of(layout, planes, cols)
    part = values_of(layout, planes.columns(layout, 256, 512), 256)
    assert torch.equal(part, whole[:, 256:])
