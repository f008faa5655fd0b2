"""The numbers of formats of 8 and 4 bits as floats: what tiles of the KV cache are unpacked with.

Called by tiles/kv.py; attention/hopper/packed_tiles.py takes the instructions. Numbers come as they
lie in words of 32 bits, and leave as float16, which has all of them exactly. On a GPU a few
instructions of PTX make four of them; Triton's interpreter, which knows none, does the same with
the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # pyright: ignore[reportAttributeAccessIssue]

# A float16 that begins with 0x64 is 1024 and the number in its last byte; with 0x54, 64 and a
# sixteenth of it.
FROM_INT8 = tl.constexpr("""{
    .reg .b32 x, low, high, bias;
    xor.b32 x, $4, 0x80808080;
    prmt.b32 low, x, 0x64646464, 0x4140;
    prmt.b32 high, x, 0x64646464, 0x4342;
    mov.b32 bias, 0x64806480;
    sub.f16x2 low, low, bias;
    sub.f16x2 high, high, bias;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
}""")
FROM_FP8 = tl.constexpr("""{
    .reg .b16 first, second;
    .reg .b32 low, high;
    mov.b32 {first, second}, $4;
    cvt.rn.f16x2.e4m3x2 low, first;
    cvt.rn.f16x2.e4m3x2 high, second;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
}""")
FROM_INT4 = tl.constexpr("""{
    .reg .b32 x, low, high, bias;
    and.b32 x, $4, 0xf0f0f0f0;
    prmt.b32 low, x, 0x54545454, 0x4140;
    prmt.b32 high, x, 0x54545454, 0x4342;
    mov.b32 bias, 0x54785478;
    sub.f16x2 low, low, bias;
    sub.f16x2 high, high, bias;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
}""")


@triton.jit
def _by_ptx(words, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM,
        "=h,=h,=h,=h,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _number(words, AT: tl.constexpr, FORMAT: tl.constexpr):
    """Returns the number of byte AT of each word; of "int4" that in its high half."""
    byte = (words >> (8 * AT)) & 255
    if FORMAT == "fp8":
        bits = ((byte & 128) << 8) | ((byte & 127) << 7)
        number = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    elif FORMAT == "int8":
        number = (byte ^ 128).to(tl.float16) - 128.0
    else:
        number = (byte >> 4).to(tl.float16) - 7.5
    return number.to(tl.float16)


@triton.jit
def numbers_of(words, FORMAT: tl.constexpr):
    """Returns float16 [N, 4 W] of words int32 [N, W]: of "int4" those in the high halves
    of bytes, less 7.5."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if IS_INTERPRETED:
        a, b = _number(words, 0, FORMAT), _number(words, 1, FORMAT)
        c, d = _number(words, 2, FORMAT), _number(words, 3, FORMAT)
    elif FORMAT == "fp8":
        a, b, c, d = _by_ptx(words, FROM_FP8)
    elif FORMAT == "int8":
        a, b, c, d = _by_ptx(words, FROM_INT8)
    else:
        tl.static_assert(FORMAT == "int4")
        a, b, c, d = _by_ptx(words, FROM_INT4)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(N, 4 * W)
