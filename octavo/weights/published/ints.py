"""Integer codes with a scale, and often a zero, for each group of a row's columns.

Called by `source`. Tensor orders: AutoAWQ ("gemm"), GPTQ (AutoGPTQ and gptqmodel) and
compressed-tensors 0.20 ("pack-quantized", "int-quantized"). A value is (code - zero) * scale.
N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from octavo.weights.published.tensors import (
    NUMBERS,
    Fetch,
    Module,
    PackedMatrix,
    Part,
    allowed,
    check_scales,
    view,
)
from octavo.weights.quantization import Quantization
from octavo.weights.schemes import WHOLE_ROW, Scheme

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word has each of its eight columns."""
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in every field of a word, by bits."""
_WORDS, _SCALES = Part(("I32",)), Part(NUMBERS)
_ORDER = Part(("I32", "I64"), (1,), is_needed=False)
Codes = Callable[[Fetch], tuple[Tensor, Tensor]]
"""Returns codes uint8 [N, K] and zeros uint8 [N, G]."""


def awq(module: Module, quantization: Quantization) -> PackedMatrix:
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]."""
    module.check({"qweight": _WORDS, "qzeros": _WORDS, "scales": _SCALES})
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
    module.check({"qweight": _WORDS, "qzeros": _WORDS, "scales": _SCALES, "g_idx": _ORDER})
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

    return _matrix(
        module, (rows, cols), bits, "scales", read, quantization, "g_idx", has_zeros=True
    )


def _gptq_bits(module: Module, rows: int, quantization: Quantization) -> int:
    """Returns the bits that the zeros were packed with; the config's, where it may be those."""
    (scheme,) = quantization.schemes.of(module.name)
    said, words = scheme.bits or 4, module.shape("qzeros")[-1]
    fitting = [bits for bits in (said, 2, 3, 4, 8) if -(-rows * bits // 32) == words]
    return fitting[0] if fitting else said  # whose shapes are refused then


def pack_quantized(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape [2], and where they
    are needed weight_zero_point int32 [N * bits / 32, G] and weight_g_idx [K]."""
    module.check(
        {
            "weight_packed": _WORDS,
            "weight_scale": _SCALES,
            "weight_shape": Part(("I64", "I32"), (1,)),
            "weight_zero_point": replace(_WORDS, is_needed=False),
            "weight_g_idx": _ORDER,
        }
    )
    rows, words = module.shape("weight_packed")
    module.expect("weight_shape", (2,))
    said_rows, cols = module.tensor("weight_shape").tolist()
    if said_rows != rows:
        module.refuse(f"weight_shape says {said_rows} rows, and weight_packed has {rows}")
    bits = 32 * words // max(1, cols)
    if -(-cols * bits // 32) != words or not 1 <= bits <= 8:
        module.refuse(f"{words} words a row cannot hold {cols} columns of equal codes")
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

    return _matrix(
        module,
        (rows, cols),
        bits,
        "weight_scale",
        read,
        quantization,
        "weight_g_idx",
        has_zeros=has_zeros,
    )


def int_quantized(module: Module, quantization: Quantization) -> PackedMatrix:
    """weight int8 [N, K], weight_scale [N, G], and where it is needed weight_zero_point [N, G]."""
    zero = Part(("I8",), (0, 1, 2), is_needed=False)
    scale = replace(_SCALES, ranks=(0, 1, 2))
    module.check({"weight": Part(("I8",)), "weight_scale": scale, "weight_zero_point": zero})
    rows, cols = module.shape("weight")
    scales = module.shape("weight_scale")
    module.expect("weight_scale", (rows, *scales[1:2]), (1, 1), (1,), ())
    has_zeros = "weight_zero_point" in module.parts
    if has_zeros:
        module.expect("weight_zero_point", scales)

    def read(fetch: Fetch) -> tuple[Tensor, Tensor]:
        codes = module.tensor("weight", fetch).to(torch.int16) + 128
        zeros = codes.new_zeros(scales)
        if has_zeros:
            zeros = module.tensor("weight_zero_point", fetch).to(torch.int16).view(scales)
        whole = (zeros + 128).to(torch.uint8).reshape(-1, *scales[1:2] or (1,))
        return codes.to(torch.uint8), whole.expand(rows, -1)

    return _matrix(module, (rows, cols), 8, "weight_scale", read, quantization, has_zeros=has_zeros)


def _order(module: Module, part: str, groups: int, group: int, fetch: Fetch) -> Tensor | None:
    """Returns the group of every column, None where they follow each other."""
    order = module.tensor(part, fetch).long()
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        module.refuse(f"{part} names groups outside of the {groups} there are")
    in_order = torch.arange(len(order), device=order.device) // group
    return None if torch.equal(order, in_order) else order


def _matrix(
    module: Module,
    shape: tuple[int, int],
    bits: int,
    scale_part: str,
    read: Codes,
    quantization: Quantization,
    order_part: str = "",
    *,
    has_zeros: bool = True,
) -> PackedMatrix:
    """Returns the matrix of the codes that `read` returns, with the scales of a part: [N, G], or
    [G, N] as `awq` and `gptq` have them. `order_part` may have the group of every column."""
    rows, cols = shape
    found = module.shape(scale_part)
    is_turned = scale_part == "scales"
    groups = found[0] if is_turned else found[1] if len(found) > 1 else 1
    codes_are = Scheme(kind="int", bits=bits, has_zeros=has_zeros)
    group = _group(module, codes_are, cols, groups, quantization)
    has_order = order_part in module.parts
    if has_order:
        module.expect(order_part, (cols,))
    may_reorder = has_order and (quantization.is_reordered or order_part == "weight_g_idx")
    order = _order(module, order_part, groups, group, view) if may_reorder else None
    form, why = _format(cols, group, bits, module.stored(scale_part).format_name, order)
    place = None if form is None or order is None else order.argsort(stable=True)

    def read_rows(fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        if (
            has_order
            and not may_reorder
            and _order(module, order_part, groups, group, fetch) is not None
        ):
            module.refuse(f"{order_part} is out of order, and the config says desc_act false")
        codes, zeros = read(fetch)
        scales = module.tensor(scale_part, fetch)
        check_scales(module.name, scales)
        scales = (scales.T if is_turned else scales.reshape(-1, groups)).expand(rows, groups)
        if form is None:
            of_column = torch.arange(cols) // group if order is None else order
            of_column = of_column.to(codes.device)
            values = (codes.float() - zeros[:, of_column].float()) * scales[:, of_column].float()
            return values, None
        if place is not None:
            codes = codes[:, place.to(codes.device)]
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
        order=None if place is None else place.to(torch.int32),
    )


def _group(
    module: Module, found: Scheme, cols: int, groups: int, quantization: Quantization
) -> int:
    """Returns how many columns share a scale. Raises WeightsError where that does not show, and for
    codes that the config does not say."""
    scheme = allowed(module, found, quantization, cols, groups)
    if scheme is not None and scheme.group is not None:
        return min(cols, scheme.group) if scheme.group != WHOLE_ROW else cols
    if groups > 1 and (cols % groups or (cols // groups).bit_count() > 1):
        # All but powers of two may as well be whole groups and a last one that is smaller.
        module.refuse(
            f"{groups} groups of {cols} columns: how wide one is the config does not say "
            "(group_size)"
        )
    return cols // groups


def _format(
    cols: int, group: int, bits: int, scale_type: str, order: Tensor | None
) -> tuple[WeightFormat | None, str | None]:
    """Returns the format in memory; or None, and why blocks cannot say what is stored."""
    sizes = [size for size in INT_GROUPS if group % size == 0 or group >= cols]
    if order is not None and not _is_even(order, group):
        return None, f"its groups, whose columns are out of order, do not have {group} each"
    if cols % GROUP or not sizes:
        return None, f"its groups of {group} in {cols} columns are no multiples of {GROUP}"
    if bits > 4:
        return int8_format(sizes[-1]), None
    if scale_type not in ("F16", "BF16"):
        return None, f"its scales are {scale_type}"
    return int4_format(sizes[-1], "f16" if scale_type == "F16" else "bf16"), None


def _is_even(order: Tensor, group: int) -> bool:
    """Whether every group has as many columns, but for the last, so that they can lie together."""
    counts = order.bincount()
    return bool((counts[:-1] == group).all()) and int(counts[-1]) <= group
