"""What weights in block formats mean, in plain torch: the specification of every format.

Used by the reference ops, by conversions at load, and by what is tested against it. Bit for bit
what the library says that defines a published format.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from octavo.formats import (
    FP8,
    GRID_FORMATS,
    NVFP4,
    PACKED_FORMATS,
    TWICE_E2M1,
    WeightFormat,
)
from octavo.kernels.weights import Weight

_SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def e4m3_scales() -> Tensor:
    """Returns the 256 float32 values of a byte as e4m3; NaN where it is none."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def gguf_scale_table() -> Tensor:
    """Returns the table of NVFP4 in GGUF files: e4m3 without its sign, halved. 0x7F means 0."""
    half = e4m3_scales()[:128].nan_to_num_(nan=480.0).mul_(0.5)
    table = torch.cat((half, half))
    table[0x7F] = 0.0
    return table


@cache
def gguf_table(form: WeightFormat) -> Tensor | None:
    """Returns the table of a format of GGUF files, one for all matrices; None if it has none."""
    if form is NVFP4:
        return gguf_scale_table()
    if form.name not in GRID_FORMATS:
        return None
    from gguf import quants  # not for models in other formats

    kind = getattr(quants, form.name.upper())
    kind.init_grid()
    table = torch.from_numpy(kind.grid.astype(np.float32).flatten())
    assert table.shape == (form.table_size,), form.name
    return table


def dequantize_rows(weight: Weight, rows: slice | Tensor) -> Tensor:
    """Returns the chosen rows of `weight` as float32 [number of rows, cols], in x's order."""
    values = _dequantized(weight, rows)
    return values if weight.order is None else in_order(values, weight.order)


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """Returns columns that are in a `Weight.order` in that of x."""
    made = torch.empty_like(values)
    made[:, order.long()] = values
    return made


def _dequantized(weight: Weight, rows: slice | Tensor) -> Tensor:
    data, form = weight.data[rows], weight.format
    if not form.is_block:
        return data.float()
    if form.name in PACKED_FORMATS or form is NVFP4:
        blocks = data.reshape(len(data), -1, form.block_bytes)
        values = _values(blocks, form, weight.table)
        return values.flatten(1)[:, : weight.cols].contiguous()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[form.name.upper()]
    values = dequantize(np.ascontiguousarray(data.numpy()), kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _values(blocks: Tensor, form: WeightFormat, table: Tensor | None) -> Tensor:
    """Returns the elements [R, blocks, ...] of blocks [R, blocks, bytes]."""
    if form is NVFP4:
        assert table is not None
        scales = table[blocks[..., :4].int()][..., None]
        codes = _nibbles(blocks[..., 4:].unflatten(-1, (4, 8)))
        values = torch.tensor(TWICE_E2M1, dtype=torch.float32)
        return (values[codes.int()] * scales).flatten(2)
    if form is FP8:
        scales = _numbers(blocks[..., :4], torch.float32)
        return _numbers(blocks[..., 4:], torch.float8_e4m3fn).float() * scales
    if form.name.startswith("int8"):
        scales = _numbers(blocks[..., :4], torch.float32)
        return (blocks[..., 5:].float() - blocks[..., 4:5].float()) * scales
    scales = _numbers(blocks[..., :2], _SCALE_DTYPES[form.name.rpartition("_")[2]]).float()
    codes = _nibbles(blocks[..., 3:].unflatten(-1, (-1, 16))).flatten(2)
    return (codes.float() - blocks[..., 2:3].float()) * scales


def _numbers(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.contiguous().view(dtype)


def _nibbles(packed: Tensor) -> Tensor:
    """Returns codes [..., 2n] of bytes [..., n]: all low nibbles, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)
