"""Integer codes with a scale, and often a zero, for each group of a row's columns.

Called by `source`. Tensor orders: AutoAWQ ("gemm"), GPTQ (AutoGPTQ and gptqmodel) and
compressed-tensors 0.20 ("pack-quantized", "int-quantized"). A value is (code - zero) * scale.
N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.formats import (
    GROUP,
    INT_GROUPS,
    WEIGHT_FORMATS,
    WeightFormat,
    int4_format,
    int8_format,
)
from octavo.weights.published.repack import int4_rows, int8_rows, unpack_codes
from octavo.weights.published.tensors import Fetch, Module, PackedMatrix, check_scales
from octavo.weights.quantization import Quantization

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word has each of its eight columns."""
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in every field of a word, by bits."""
Codes = Callable[[Fetch], tuple[Tensor, Tensor]]
"""Returns codes uint8 [N, K] and zeros uint8 [N, G]."""


def awq(module: Module, quantization: Quantization) -> PackedMatrix:
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]."""
    cols, words = module.shape("qweight")
    rows, groups = 8 * words, module.shape("scales")[0]
    module.expect("scales", (groups, rows))
    module.expect("qzeros", (groups, words))

    def read(fetch: Fetch) -> tuple[Tensor, Tensor]:
        zeros = _awq_codes(module.tensor("qzeros", fetch))
        return _awq_codes(module.tensor("qweight", fetch)).T, zeros.T

    return _matrix(module, (rows, cols), 4, "scales", read, quantization)


def _awq_codes(words: Tensor) -> Tensor:
    nibbles = unpack_codes(words.reshape(-1, 1), 4, 8)
    return nibbles[:, list(_AWQ_PLACES)].view(len(words), -1)


def gptq(module: Module, quantization: Quantization) -> PackedMatrix:
    """qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales [G, N], and where
    columns are out of order g_idx int32 [K]."""
    words, rows = module.shape("qweight")
    bits = _gptq_bits(module, rows, quantization)
    cols, groups = 32 * words // bits, module.shape("scales")[0]
    if "g_idx" in module.parts:
        cols = module.shape("g_idx")[0]
        module.expect("qweight", (-(-cols * bits // 32), rows))
    module.expect("scales", (groups, rows))
    module.expect("qzeros", (groups, -(-rows * bits // 32)))

    def read(fetch: Fetch) -> tuple[Tensor, Tensor]:
        codes = unpack_codes(module.tensor("qweight", fetch).T, bits, cols)
        stored = module.tensor("qzeros", fetch)
        if quantization.zeros_less_one and bits in _ONES:
            # Whole words were counted down: a zero of 0 has borrowed from the next one.
            stored = (stored.to(torch.int64) + _ONES[bits]).to(torch.int32)
        zeros = unpack_codes(stored, bits, rows)
        if quantization.zeros_less_one and bits not in _ONES:
            zeros = zeros + 1
        return codes, zeros.T

    order = _order(module, "g_idx", groups, cols) if quantization.is_reordered else None
    return _matrix(module, (rows, cols), bits, "scales", read, quantization, order)


def _gptq_bits(module: Module, rows: int, quantization: Quantization) -> int:
    """Returns the bits of a code: the config's, or where it has some for tensors apart those that
    the zeros were packed with."""
    said, words = quantization.bits or 4, module.shape("qzeros")[-1]
    fitting = [bits for bits in (said, 2, 3, 4, 8) if -(-rows * bits // 32) == words]
    found = fitting[0] if fitting else said  # whose shapes are refused then
    _check_said(module, "codes of {} bits", found, said, quantization)
    return found


def _check_said(
    module: Module, what: str, found: int, said: int | None, quantization: Quantization
) -> None:
    """Raises WeightsError if a tensor has another number than the config says of all."""
    if said is not None and found != said and not quantization.varies:
        module.refuse(
            f"{what.format(found)}, and the config's quantization says {said}; check that config "
            "and weights belong together"
        )


def pack_quantized(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape [2], and where they
    are needed weight_zero_point int32 [N * bits / 32, G] and weight_g_idx [K]."""
    rows, words = module.shape("weight_packed")
    cols = int(module.tensor("weight_shape")[1])
    bits = 32 * words // max(1, cols)
    if -(-cols * bits // 32) != words or not 1 <= bits <= 8:
        module.refuse(f"{words} words a row cannot hold {cols} columns of equal codes")
    _check_said(module, "codes of {} bits", bits, quantization.bits, quantization)
    if module.shape("weight_scale")[0] != rows:
        module.refuse(f"weight_scale has {module.shape('weight_scale')[0]} rows, not {rows}")
    groups = module.shape("weight_scale")[1]
    has_zeros = "weight_zero_point" in module.parts
    if has_zeros:
        module.expect("weight_zero_point", (-(-rows * bits // 32), groups))

    def read(fetch: Fetch) -> tuple[Tensor, Tensor]:
        codes = unpack_codes(module.tensor("weight_packed", fetch), bits, cols)
        zeros = codes.new_full((rows, groups), 1 << bits - 1)
        if has_zeros:
            zeros = unpack_codes(module.tensor("weight_zero_point", fetch).T, bits, rows).T
        return codes, zeros

    order = None
    if "weight_g_idx" in module.parts:
        order = _order(module, "weight_g_idx", groups, cols)
    return _matrix(module, (rows, cols), bits, "weight_scale", read, quantization, order)


def int_quantized(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight int8 [N, K], weight_scale [N, G], and where it is needed weight_zero_point [N, G]."""
    rows, cols = module.shape("weight")
    scales = module.shape("weight_scale")
    module.expect("weight_scale", (rows, *scales[1:2]), (1, 1), (1,))
    has_zeros = "weight_zero_point" in module.parts

    def read(fetch: Fetch) -> tuple[Tensor, Tensor]:
        codes = module.tensor("weight", fetch).to(torch.int16) + 128
        zeros = codes.new_zeros(scales)
        if has_zeros:
            zeros = module.tensor("weight_zero_point", fetch).to(torch.int16).view(scales)
        whole = (zeros + 128).to(torch.uint8).reshape(-1, *scales[1:2] or (1,))
        return codes.to(torch.uint8), whole.expand(rows, -1)

    return _matrix(module, (rows, cols), 8, "weight_scale", read, quantization)


def _order(module: Module, part: str, groups: int, cols: int) -> Tensor | None:
    """Returns the group of every column, None where they follow each other."""
    order = module.tensor(part).long()
    module.expect(part, (cols,))
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        module.refuse(f"{part} names groups outside of the {groups} there are")
    group = -(-cols // groups)
    return None if torch.equal(order, torch.arange(cols) // group) else order


def _matrix(
    module: Module,
    shape: tuple[int, int],
    bits: int,
    scale_part: str,
    read: Codes,
    quantization: Quantization,
    order: Tensor | None = None,
) -> PackedMatrix:
    """Returns the matrix of the codes that `read` returns, with the scales of a part: [N, G], or
    [G, N] as `awq` and `gptq` have them."""
    rows, cols = shape
    found = module.shape(scale_part)
    is_turned = scale_part == "scales"
    groups = found[0] if is_turned else found[1] if len(found) > 1 else 1
    group = -(-cols // groups)
    said = quantization.group
    if said is not None and -(-cols // said) != groups:
        _check_said(module, f"{groups} groups of {{}} columns", group, said, quantization)
    elif said is not None and groups > 1:
        group = said
    form, why = _format(cols, group, bits, module.stored(scale_part).format_name, order)

    def read_rows(fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        codes, zeros = read(fetch)
        scales = module.tensor(scale_part, fetch)
        check_scales(module.name, scales)
        scales = (scales.T if is_turned else scales.reshape(-1, groups)).expand(rows, groups)
        if form is None:
            of_column = torch.arange(cols) // group if order is None else order
            of_column = of_column.to(codes.device)
            values = (codes.float() - zeros[:, of_column].float()) * scales[:, of_column].float()
            return values, None
        of_block = torch.arange(0, cols, form.block_size, device=codes.device) // group
        wide = [one[:, of_block] for one in (scales, zeros)]
        rows_of = int4_rows if bits <= 4 else int8_rows
        return rows_of(codes, wide[0], wide[1], form), None

    return PackedMatrix(
        shape=shape,
        format=form or WEIGHT_FORMATS["f32"],
        read=read_rows,
        stored=tuple(module.parts.values()),
        unpacked_because=why,
    )


def _format(
    cols: int, group: int, bits: int, scale_type: str, order: Tensor | None
) -> tuple[WeightFormat | None, str | None]:
    """Returns the format in memory; or None, and why blocks cannot say what is stored."""
    sizes = [size for size in INT_GROUPS if group % size == 0 or group >= cols]
    if order is not None:
        return None, "its columns belong to groups out of order (desc_act)"
    if cols % GROUP or not sizes:
        return None, f"its groups of {group} in {cols} columns are no multiples of {GROUP}"
    if bits > 4:
        return int8_format(sizes[-1]), None
    if scale_type not in ("F16", "BF16"):
        return None, f"its scales are {scale_type}"
    return int4_format(sizes[-1], "f16" if scale_type == "F16" else "bf16"), None
