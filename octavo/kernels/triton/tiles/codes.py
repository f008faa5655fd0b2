"""Codes of packed weights as floats, in registers: what `tiles/packed.py` multiplies.

Words of 16 bits have two, four or eight codes, "parts" (`octavo.planes`). Numbers are exact in
bfloat16 and float16; scales are applied later. On a GPU a few instructions of PTX (`ptx.py`) make
the parts of two words; Triton's interpreter, which knows none, computes the same with the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.ptx import SMALL, constraints_of, text_of
from octavo.planes import IQ4_VALUES, PLANE_LAYOUTS

IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # pyright: ignore[reportAttributeAccessIssue]
_IQ4 = tl.constexpr(IQ4_VALUES)
_TEXTS = {
    (layout.name, is_bf16, sub): text_of(layout, is_bf16, sub)
    for layout in PLANE_LAYOUTS.values()
    for is_bf16 in (True, False)
    for sub in range(layout.runs)
}
_SMALL_TEXTS = {
    layout.name: text_of(layout, True, 0, is_small=True)
    for layout in PLANE_LAYOUTS.values()
    if layout.values in SMALL
}
_CONSTRAINTS = {layout.name: constraints_of(layout) for layout in PLANE_LAYOUTS.values()}


@triton.constexpr_function
def values_of(format: str) -> str:
    return PLANE_LAYOUTS[format].values


@triton.constexpr_function
def bits_of(format: str) -> int:
    return PLANE_LAYOUTS[format].bits


@triton.constexpr_function
def high_of(format: str) -> int:
    return PLANE_LAYOUTS[format].high


@triton.constexpr_function
def parts_of(format: str) -> int:
    """Codes in a word."""
    return PLANE_LAYOUTS[format].parts


@triton.constexpr_function
def by_ptx(dtype: tl.dtype) -> bool:
    """Whether numbers are made by PTX."""
    return not IS_INTERPRETED.value and dtype in (tl.bfloat16, tl.float16)


@triton.constexpr_function
def bias_of(dtype: tl.dtype, format: str) -> int:
    """What `raw_parts` are larger by than their codes."""
    layout = PLANE_LAYOUTS[format]
    is_whole = layout.values == "uint" and not (layout.bits == 8 and dtype == tl.bfloat16)
    if not is_whole or not by_ptx(dtype):
        return 0
    return 128 if dtype == tl.bfloat16 else 1024


@triton.constexpr_function
def small_power(dtype: tl.dtype, format: str) -> int:
    """Returns by which power of two numbers may be too small, if that saves a multiplication."""
    values = PLANE_LAYOUTS[format].values
    return SMALL[values] if dtype == tl.bfloat16 and values in SMALL else 0


@triton.constexpr_function
def _text(dtype: tl.dtype, format: str, sub: int, is_small: bool) -> str:
    if is_small:
        return _SMALL_TEXTS[format]
    return _TEXTS[format, dtype == tl.bfloat16, sub]


@triton.constexpr_function
def _constraints(format: str) -> str:
    return _CONSTRAINTS[format]


@triton.constexpr_function
def _types(dtype: tl.dtype, format: str) -> tuple[tl.dtype, ...]:
    return (dtype,) * PLANE_LAYOUTS[format].parts


@triton.jit
def raw_parts(words, high, SUB: tl.constexpr, dtype: tl.constexpr, FORMAT: tl.constexpr,
              IS_SMALL: tl.constexpr = False):  # fmt: skip
    """Returns a tile of numbers for each part of the words int16, larger by `bias_of`. `high` has
    the words of their high bits, of which those of the words are the part SUB; or is anything.
    IS_SMALL, which only GPUs know: numbers are too small by the `small_power`."""
    if by_ptx(dtype):
        ASM: tl.constexpr = _text(dtype, FORMAT, SUB, IS_SMALL)
        TYPES: tl.constexpr = _types(dtype, FORMAT)
        if high_of(FORMAT) > 0:
            parts = tl.inline_asm_elementwise(
                ASM, _constraints(FORMAT), [words, high], dtype=TYPES, is_pure=True, pack=2
            )
        else:
            parts = tl.inline_asm_elementwise(
                ASM, _constraints(FORMAT), [words], dtype=TYPES, is_pure=True, pack=2
            )
    else:
        parts = (_number(words, high, 0, SUB, dtype, FORMAT),)
        for part in tl.static_range(1, parts_of(FORMAT)):
            parts += (_number(words, high, part, SUB, dtype, FORMAT),)
    return parts


@triton.jit
def _number(words, high, PART: tl.constexpr, SUB, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the numbers of part PART. SUB may be a tile."""
    BITS: tl.constexpr = bits_of(FORMAT)
    HIGH: tl.constexpr = high_of(FORMAT)
    code = (words.to(tl.int32) >> (BITS * PART)) & ((1 << BITS) - 1)
    if HIGH > 0:
        above = high.to(tl.int32) >> (HIGH * (parts_of(FORMAT) * SUB + PART))
        code |= (above & ((1 << HIGH) - 1)) << BITS
    if values_of(FORMAT) == "e4m3":
        number = e4m3_number(code)
    elif values_of(FORMAT) == "e2m1":
        size = code & 7
        exponent = size >> 1
        mantissa = (size & 1).to(tl.float32)
        power = (1 << tl.maximum(exponent, 1)).to(tl.float32) * 0.5
        number = tl.where(exponent > 0, (1.0 + 0.5 * mantissa) * power, 0.5 * mantissa)
        number = tl.where(code >= 8, -number, number)
    elif values_of(FORMAT) == "iq4":
        number = tl.zeros(code.shape, tl.float32)
        for one in tl.static_range(16):
            number = tl.where(code == one, _IQ4[one], number)
    else:
        number = code.to(tl.float32)
    return number.to(dtype)


@triton.jit
def e4m3_number(code):
    """Returns the float32 of an e4m3 in 8 bits of an int32."""
    bits = ((code & 128) << 8) | ((code & 127) << 7)
    half = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return half * 256.0


@triton.jit
def joined(parts, FORMAT: tl.constexpr):
    """Returns the parts [N, WORDS] side by side: of one run of words, its columns in order. Which
    thread has what stays the same."""
    N: tl.constexpr = parts[0].shape[0]
    ALL: tl.constexpr = parts[0].shape[1] * parts_of(FORMAT)
    if parts_of(FORMAT) == 2:
        whole = tl.join(parts[0], parts[1]).permute(0, 2, 1)
    elif parts_of(FORMAT) == 4:
        whole = _four(parts[0], parts[1], parts[2], parts[3]).permute(0, 3, 2, 1)
    else:
        first = _four(parts[0], parts[1], parts[2], parts[3])
        second = _four(parts[4], parts[5], parts[6], parts[7])
        whole = tl.join(first, second).permute(0, 4, 3, 2, 1)
    return whole.reshape(N, ALL)


@triton.jit
def _four(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))
