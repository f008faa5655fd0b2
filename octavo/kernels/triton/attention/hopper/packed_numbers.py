"""Numbers of compressed keys and values out of their words, in the order that products take.

Called by packed_products.py. Numbers of a word come in pairs of 16 bits. With nothing above them,
the bits of a number are those of a float16 (keys) or of a bfloat16 (values) that is so many times
the least.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.triton.attention.hopper.packed_scales import by_halves
from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS
from octavo.kernels.triton.tiles.numbers import FROM_FP8

FROM_BYTES = gl.constexpr("""{
    .reg .b32 x, y, excess;
    mov.b32 excess, 0x00800080;
    lop3.b32 x, $4, 0x00ff00ff, excess, 0x6a;
    mov.b32 {$0, $1}, x;
    shr.u32 y, $4, 8;
    lop3.b32 y, y, 0x00ff00ff, excess, 0x6a;
    mov.b32 {$2, $3}, y;
}""")
FP8_AS_BF16 = gl.constexpr("""{
    .reg .b32 x, y, sign;
    shl.b32 x, $4, 8;
    and.b32 sign, x, 0x80008000;
    shr.u32 x, x, 4;
    lop3.b32 x, x, 0x07f007f0, sign, 0xea;
    mov.b32 {$0, $1}, x;
    and.b32 sign, $4, 0x80008000;
    shr.u32 y, $4, 4;
    lop3.b32 y, y, 0x07f007f0, sign, 0xea;
    mov.b32 {$2, $3}, y;
}""")
"""2^-120 of each number, NaN apart, which becomes one."""


@gluon.jit
def in_key_order(x, FORMAT: gl.constexpr):
    """Returns x [ROWS, PART] with its columns as they are in rows of keys: those of a thread, of
    every 16, are what it takes from memory in one piece."""
    ROWS: gl.constexpr = x.shape[0]
    PART: gl.constexpr = x.shape[1]
    LOW: gl.constexpr = 4 if PART > 32 else 2
    x = x.reshape([ROWS, PART // (16 * LOW), 4, LOW, 2, 2])
    # But for fp8 bytes 0 and 2 of a word are neighbours.
    x = x.permute((0, 1, 3, 4, 2, 5) if FORMAT == "fp8" else (0, 1, 3, 5, 2, 4))
    return x.reshape([ROWS, PART])


@gluon.jit
def _two(words, ASM: gl.constexpr):
    """Returns [..., 2, 2] of 16 bits of each word [...]: pairs of numbers."""
    a, b, c, d = gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [words], dtype=(gl.int16,) * 4, is_pure=True, pack=1
    )
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def _halves(words):
    """Returns the low and the high numbers of bytes, each as `_two` does: those of bytes 0 and 2,
    then of bytes 1 and 3."""
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """{
            .reg .b32 x, y;
            shr.u32 y, $8, 8;
            and.b32 x, $8, 0x000f000f;
            mov.b32 {$0, $1}, x;
            and.b32 x, y, 0x000f000f;
            mov.b32 {$2, $3}, x;
            and.b32 x, $8, 0x00f000f0;
            mov.b32 {$4, $5}, x;
            and.b32 x, y, 0x00f000f0;
            mov.b32 {$6, $7}, x;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r",
        [words],
        dtype=(gl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    low = gl.join(gl.join(a, c), gl.join(b, d))
    return low, gl.join(gl.join(e, g), gl.join(f, h))


@gluon.jit
def pairs_of(words, FORMAT: gl.constexpr, IS_KEY: gl.constexpr):
    """Returns the numbers of words as a tuple of parts of words [..., 2, 2]: of keys in fp8 in the
    order that they lie in, else those of bytes 0 and 2 first."""
    if FORMAT == "int4":
        return _halves(words)
    elif FORMAT == "int8":
        return (_two(words, FROM_BYTES),)
    elif IS_KEY:
        return (_two(words, FROM_FP8),)
    else:
        return (_two(words, FP8_AS_BF16),)


@gluon.jit
def key_part(low, high, mma: gl.constexpr):
    """Returns a part of keys [W, TOKENS, PART], ordered as queries are, of the numbers [W, 8,
    WORDS, 2, 2] of the first and of the other tokens."""
    W: gl.constexpr = low.shape[0]
    WORDS: gl.constexpr = low.shape[2]
    LOW: gl.constexpr = 4 if WORDS > 8 else 2
    x = gl.join(low, high).reshape([W, 8, WORDS // (4 * LOW), 4, LOW, 2, 2, 2])
    x = x.permute((0, 7, 1, 2, 4, 5, 3, 6)).reshape([W, TOKENS, 4 * WORDS])
    x = x.to(gl.float16, bitcast=True)
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def crossed(even, odd):
    """Returns words [..., 2] whose pairs are the same number of two tokens: numbers 0 and 1, then 2
    and 3."""
    first, second = by_halves(even, odd)
    return gl.join(first, second)


@gluon.jit
def value_part(low, high, mma: gl.constexpr):
    """Returns a part of values [W, PART, TOKENS]: row 8 i + g has number g * PART / 8 + i. Of the
    numbers [W, 4, WORDS, 2, 2, 2] of tokens 2 i and 2 i + 1 (last of all), and of 8 more."""
    W: gl.constexpr = low.shape[0]
    WORDS: gl.constexpr = low.shape[2]
    x = gl.join(low, high).reshape([W, 4, 8, WORDS // 8, 2, 2, 2, 2])
    x = x.permute((0, 3, 4, 5, 2, 7, 1, 6)).reshape([W, 4 * WORDS, TOKENS])
    x = x.to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))
