"""Numbers of 8 and 4 bits with scales: FP8, MXFP4, NVFP4.

Called by `source`. Tensor orders: transformers' and DeepSeek's FP8 (`weight_scale_inv`, which
multiplies), compressed-tensors 0.20, NVIDIA ModelOpt, and gpt-oss's stacks of MXFP4.
N rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.formats import FP8, GROUP, NVFP4, WEIGHT_FORMATS
from octavo.kernels.dequantize import e4m3_scales
from octavo.weights.published.repack import fp8_rows, mxfp4_rows, nvfp4_rows
from octavo.weights.published.tensors import (
    NUMBERS,
    Fetch,
    Module,
    PackedMatrix,
    Part,
    allowed,
    check_exponents,
    check_scales,
)
from octavo.weights.quantization import Quantization
from octavo.weights.schemes import Scheme

MXFP4 = WEIGHT_FORMATS["mxfp4"]
EXPONENTS = ("U8", "F8_E8M0")
FP8_SCALES = (*NUMBERS, "F8_E8M0")
_NAN = 0x7F


def fp8(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight e4m3 [N, K]; weight_scale_inv or weight_scale of one number, [N, 1] or blocks of
    128 x 128 (the last ones may be partial), in float32, bf16, f16 or as exponents. ModelOpt
    writes those of blocks (FP8_PB_WO) as [N / 128, 1, K / 128, 1]."""
    part = "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    ranks = (0, 1, 2, 4) if quantization.method == "modelopt" else (0, 1, 2)
    module.check({"weight": Part(("F8_E4M3",)), part: Part(FP8_SCALES, ranks)})
    rows, cols = module.shape("weight")
    grid = module.shape(part)
    if len(grid) == 4 and grid[1::2] == (1, 1):
        grid = grid[::2]
    groups = grid[1] if len(grid) == 2 else 1
    allowed(module, Scheme(kind="float", bits=8), quantization, cols, groups)
    block = fp8_block(module.name, (rows, cols), grid, quantization)
    why = fp8_unpacked_because(cols, block[1])
    is_packed = why is None

    def read(fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        numbers, scales = module.tensor("weight", fetch), module.tensor(part, fetch).view(grid)
        return fp8_values(module.name, numbers, scales, block, is_packed), None

    return PackedMatrix(
        shape=(rows, cols),
        format=FP8 if is_packed else WEIGHT_FORMATS["f32"],
        read=read,
        stored=tuple(module.parts.values()),
        has_row_scales=block[1] >= cols,
        unpacked_because=why,
    )


def fp8_unpacked_because(cols: int, width: int) -> str | None:
    """Returns why rows whose scales are for `width` columns cannot be blocks of the format fp8."""
    if cols % GROUP == 0 and (width % FP8.block_size == 0 or width >= cols):
        return None
    return f"its scales are for {width} of {cols} columns"


def fp8_block(
    name: str, shape: tuple[int, int], scales: tuple[int, ...], quantization: Quantization
) -> tuple[int, int]:
    """Returns how many rows and columns share a scale. Raises WeightsError."""
    rows, cols = shape
    block = quantization.block or (128, 128)
    if scales == (-(-rows // block[0]), -(-cols // block[1])):
        return block
    if quantization.block is None:  # else nothing but blocks is what the config says
        if scales in ((), (1,), (1, 1)):
            return rows, cols
        if scales in ((rows,), (rows, 1)):
            return 1, cols
        if len(scales) == 2 and scales[0] == rows and cols % scales[1] == 0:
            return 1, cols // scales[1]
    Module(name, {}).refuse(
        f"scales of the shape {list(scales)} do not fit {rows} x {cols} numbers in blocks of "
        f"{block[0]} x {block[1]}"
    )


def fp8_values(
    name: str, numbers: Tensor, scales: Tensor, block: tuple[int, int], is_packed: bool
) -> Tensor:
    """Returns rows of the format fp8, or float32 values where it cannot say them."""
    check_scales(name, scales)
    if bool((numbers.view(torch.uint8) & _NAN == _NAN).any()):
        Module(name, {}).refuse("some numbers are NaN; download the model again")
    rows, cols = numbers.shape
    scales = scales.float().reshape(-1, scales.shape[-1] if scales.dim() > 1 else 1)
    of_rows = scales[torch.arange(rows, device=scales.device) // block[0]]
    width = FP8.block_size if is_packed else 1
    columns = torch.arange(0, cols, width, device=scales.device) // block[1]
    wide = of_rows[:, columns.clamp_(max=of_rows.shape[1] - 1)]
    return fp8_rows(numbers, wide) if is_packed else numbers.float() * wide


def nvfp4(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight_packed (or weight) uint8 [N, K / 2], weight_scale e4m3 [N, K / 16], and one number:
    weight_global_scale, which divides, or weight_scale_2, which multiplies."""
    codes = "weight_packed" if "weight_packed" in module.parts else "weight"
    of_all = "weight_global_scale" if codes == "weight_packed" else "weight_scale_2"
    factor_part = Part(("F32",), (0, 1))
    module.check({codes: Part(("U8",)), "weight_scale": Part(("F8_E4M3",)), of_all: factor_part})
    module.expect(of_all, (), (1,))
    allowed(module, Scheme(kind="float", bits=4), quantization)
    rows, cols = module.shape(codes)[0], 2 * module.shape(codes)[1]
    module.expect("weight_scale", (rows, cols // 16))
    if cols % GROUP:
        module.refuse(f"{cols} columns are no multiple of {GROUP}")

    def read(fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        scales = module.tensor("weight_scale", fetch)
        check_scales(module.name, scales)
        is_divisor = codes == "weight_packed"
        factor = module.tensor(of_all)
        check_scales(module.name, factor)
        scalar = factor.reshape(())
        table = e4m3_scales() / scalar if is_divisor else e4m3_scales() * scalar
        # The kernels' values are doubled, as in ggml's files.
        return nvfp4_rows(module.tensor(codes, fetch), scales), table.mul_(0.5)

    return PackedMatrix(
        shape=(rows, cols), format=NVFP4, read=read, stored=tuple(module.parts.values())
    )


def mxfp4(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32] of exponents."""
    module.check({"weight_packed": Part(("U8",)), "weight_scale": Part(EXPONENTS)})
    allowed(module, Scheme(kind="float", bits=4), quantization)
    rows, cols = module.shape("weight_packed")[0], 2 * module.shape("weight_packed")[1]
    if cols % GROUP:
        module.refuse(f"{cols} columns are no multiple of {GROUP}")
    module.expect("weight_scale", (rows, cols // GROUP))

    def read(fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        exponents = module.tensor("weight_scale", fetch).view(torch.uint8)
        check_exponents(module.name, exponents)
        return mxfp4_rows(module.tensor("weight_packed", fetch), exponents), None

    return PackedMatrix(
        shape=(rows, cols), format=MXFP4, read=read, stored=tuple(module.parts.values())
    )
