"""Codes of packed weights as floats, in registers: what `tiles/packed.py` multiplies.

Words of 16 bits have two or four codes, "parts" (`octavo.planes`). Numbers are exact in bfloat16
and float16; scales are applied later. On a GPU a few instructions of PTX make the parts of two
words; Triton's interpreter, which knows none, computes the same with the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.planes import PLANE_LAYOUTS

IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # pyright: ignore[reportAttributeAccessIssue]


@triton.constexpr_function
def values_of(format: str) -> str:
    return PLANE_LAYOUTS[format].values


@triton.constexpr_function
def bits_of(format: str) -> int:
    return PLANE_LAYOUTS[format].bits


@triton.constexpr_function
def parts_of(format: str) -> int:
    """Codes in a word."""
    return PLANE_LAYOUTS[format].parts


@triton.constexpr_function
def by_ptx(dtype: tl.dtype, format: str) -> bool:
    """Whether numbers are made by PTX: all but those of 8 bits that are no floats."""
    layout = PLANE_LAYOUTS[format]
    is_short = dtype in (tl.bfloat16, tl.float16)
    is_byte = layout.values == "uint" and layout.bits == 8
    return not IS_INTERPRETED.value and is_short and not is_byte


@triton.constexpr_function
def bias_of(dtype: tl.dtype, format: str) -> int:
    """What `raw_parts` are larger by than their codes."""
    if PLANE_LAYOUTS[format].values != "uint" or not by_ptx(dtype, format):
        return 0
    return 128 if dtype == tl.bfloat16 else 1024


# A bfloat16 that begins with 0x43 is 128 and the number in its last 7 bits, a float16 with 0x64
# 1024 and that in its last 10. e2m1 and e4m3 become the exponent and the mantissa of a number that
# is by a power of two too small.
_SHIFTED = """{
    .reg .b32 a, b, c;
    shr.u32 a, $4, 4;
    shr.u32 b, $4, 8;
    shr.u32 c, $4, 12;
"""
_SOURCES = (("$4", "$0"), ("a", "$1"), ("b", "$2"), ("c", "$3"))


def _uint(is_bf16: bool, less: bool) -> tl.constexpr:
    magic, kind = ("0x43004300", "bf16x2") if is_bf16 else ("0x64006400", "f16x2")
    text = _SHIFTED
    for source, target in _SOURCES:
        text += f"lop3.b32 {target}, {source}, 0x000f000f, {magic}, 0xea;\n"
    if less:
        text += "".join(f"sub.rn.{kind} {one}, {one}, $5;\n" for _, one in _SOURCES)
    return tl.constexpr(text + "}")


def _e2m1_text(is_bf16: bool) -> tl.constexpr:
    kind, shift, mask, factor = (
        ("bf16x2", 6, "0x01c001c0", "0x7e807e80")
        if is_bf16
        else ("f16x2", 9, "0x0e000e00", "0x74007400")
    )
    text = _SHIFTED + f".reg .b32 e, f, g;\nmov.b32 g, {factor};\n"
    for source, target in _SOURCES:
        text += f"""
            shl.b32 e, {source}, {shift};
            shl.b32 f, {source}, 12;
            and.b32 e, e, {mask};
            lop3.b32 e, f, 0x80008000, e, 0xea;
            mul.rn.{kind} {target}, e, g;
        """
    return tl.constexpr(text + "}")


_RAW_BF16, _RAW_F16 = _uint(True, False), _uint(False, False)
_LESS_BF16, _LESS_F16 = _uint(True, True), _uint(False, True)
_E2M1_BF16, _E2M1_F16 = _e2m1_text(True), _e2m1_text(False)
_E4M3_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, g;
    mov.b32 g, 0x7b807b80;
    shl.b32 a, $2, 8;
    shr.u32 b, a, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 b, a, 0x80008000, b, 0xea;
    mul.rn.bf16x2 $0, b, g;
    shr.u32 c, $2, 4;
    and.b32 c, c, 0x07f007f0;
    lop3.b32 c, $2, 0x80008000, c, 0xea;
    mul.rn.bf16x2 $1, c, g;
}""")
_E4M3_F16 = tl.constexpr("""{
    .reg .b32 a, b, c, g;
    mov.b32 g, 0x5c005c00;
    shl.b32 a, $2, 8;
    shr.u32 b, a, 1;
    and.b32 b, b, 0x3f803f80;
    lop3.b32 b, a, 0x80008000, b, 0xea;
    mul.rn.f16x2 $0, b, g;
    shr.u32 c, $2, 1;
    and.b32 c, c, 0x3f803f80;
    lop3.b32 c, $2, 0x80008000, c, 0xea;
    mul.rn.f16x2 $1, c, g;
}""")


@triton.jit
def _four_bf16(words, ASM: tl.constexpr):
    # The types of a tuple must stand there by name.
    BF16: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r", [words], dtype=BF16, is_pure=True, pack=2
    )


@triton.jit
def _four_f16(words, ASM: tl.constexpr):
    F16: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [words], dtype=F16, is_pure=True, pack=2)


@triton.jit
def raw_parts(words, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Returns a tile of numbers for each part of the words int16, larger by `bias_of`."""
    VALUES: tl.constexpr = values_of(FORMAT)
    IS_BF16: tl.constexpr = dtype == tl.bfloat16
    if not by_ptx(dtype, FORMAT):
        parts = _parts_by_bits(words, dtype, FORMAT)
    elif VALUES == "e4m3":
        if IS_BF16:
            parts = tl.inline_asm_elementwise(
                *(_E4M3_BF16, "=r,=r,r", [words]), (tl.bfloat16, tl.bfloat16), True, 2
            )
        else:
            parts = tl.inline_asm_elementwise(
                *(_E4M3_F16, "=r,=r,r", [words]), (tl.float16, tl.float16), True, 2
            )
    elif IS_BF16:
        ASM: tl.constexpr = _E2M1_BF16 if VALUES == "e2m1" else _RAW_BF16
        parts = _four_bf16(words, ASM)
    else:
        ASM: tl.constexpr = _E2M1_F16 if VALUES == "e2m1" else _RAW_F16
        parts = _four_f16(words, ASM)
    return parts


@triton.jit
def parts_less(words, zero, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Returns a tile of numbers for each part of the words int16, less `zero` float32, which
    broadcasts. For codes that are no floats."""
    tl.static_assert(values_of(FORMAT) == "uint")
    if by_ptx(dtype, FORMAT):
        wide = tl.broadcast_to((zero + bias_of(dtype, FORMAT)).to(dtype), words.shape)
        if dtype == tl.bfloat16:
            parts = tl.inline_asm_elementwise(
                *(_LESS_BF16, "=r,=r,=r,=r,r,r", [words, wide]),
                *((tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2),
            )
        else:
            parts = tl.inline_asm_elementwise(
                *(_LESS_F16, "=r,=r,=r,=r,r,r", [words, wide]),
                *((tl.float16, tl.float16, tl.float16, tl.float16), True, 2),
            )
    elif bits_of(FORMAT) == 8:
        a, b = _parts_by_bits(words, tl.float32, FORMAT)
        parts = ((a - zero).to(dtype), (b - zero).to(dtype))
    else:
        a, b, c, d = _parts_by_bits(words, tl.float32, FORMAT)
        parts = (
            (a - zero).to(dtype),
            (b - zero).to(dtype),
            (c - zero).to(dtype),
            (d - zero).to(dtype),
        )
    return parts


@triton.jit
def _parts_by_bits(words, dtype: tl.constexpr, FORMAT: tl.constexpr):
    if bits_of(FORMAT) == 8:
        parts = (_number(words, 0, dtype, FORMAT), _number(words, 1, dtype, FORMAT))
    else:
        parts = (
            _number(words, 0, dtype, FORMAT),
            _number(words, 1, dtype, FORMAT),
            _number(words, 2, dtype, FORMAT),
            _number(words, 3, dtype, FORMAT),
        )
    return parts


@triton.jit
def _number(words, PART: tl.constexpr, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the numbers of part PART."""
    BITS: tl.constexpr = bits_of(FORMAT)
    code = (words.to(tl.int32) >> (BITS * PART)) & ((1 << BITS) - 1)
    if values_of(FORMAT) == "e4m3":
        bits = ((code & 128) << 8) | ((code & 127) << 7)
        half = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        number = half * 256.0
    elif values_of(FORMAT) == "e2m1":
        size = code & 7
        exponent = size >> 1
        mantissa = (size & 1).to(tl.float32)
        power = (1 << tl.maximum(exponent, 1)).to(tl.float32) * 0.5
        number = tl.where(exponent > 0, (1.0 + 0.5 * mantissa) * power, 0.5 * mantissa)
        number = tl.where(code >= 8, -number, number)
    else:
        number = code.to(tl.float32)
    return number.to(dtype)
