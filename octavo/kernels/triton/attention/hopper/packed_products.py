"""Numbers of compressed keys and values out of their words, and products with them.

Called by lone.py on what packed_tiles.py loaded. Keys are rows of their product with queries and
values columns of theirs with weights, so that what a thread loads is what it multiplies, once
unpacked. To that end the numbers of a vector are taken in another order than they lie in: dot
products do not mind, and queries and sums are put in that order, or back, once a program.

A PART of a vector is what shares a scale: all of it, of int4 32 numbers. Tensors are [W, ...], W
the warps. Numbers of int8 and int4 are multiplied as they lie in their words: with nothing above
them, their bits are those of a float16 that is so many STEPs. They are BIAS too large (int8 in
excess 128), which is taken off sums: it costs less than taking it off each number.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from octavo.formats import KV_FORMATS
from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS, blocks_of
from octavo.kernels.triton.tiles.numbers import FROM_FP8

STEP = gl.constexpr(2.0**-24)
"""The least float16."""
LEAST_UNIT = gl.constexpr(1e-30)
MOST_UNIT = gl.constexpr(2.0**120)
"""Weights are at most 2^8 of a larger one."""
FROM_BYTES = gl.constexpr("""{
    .reg .b32 x, y, excess;
    mov.b32 excess, 0x00800080;
    lop3.b32 x, $4, 0x00ff00ff, excess, 0x6a;
    mov.b32 {$0, $1}, x;
    shr.u32 y, $4, 8;
    lop3.b32 y, y, 0x00ff00ff, excess, 0x6a;
    mov.b32 {$2, $3}, y;
}""")


@gluon.constexpr_function
def part_size(format: str, size: int) -> int:
    """Returns the numbers of a part of vectors of `size`."""
    return size // KV_FORMATS[format].num_scales(size)


@gluon.constexpr_function
def num_parts(format: str, size: int) -> int:
    return KV_FORMATS[format].num_scales(size)


@gluon.constexpr_function
def bias_of(format: str) -> float:
    """Returns by how many STEPs numbers are too large as they are multiplied."""
    return {"int4": 7.5, "int8": 128.0, "fp8": 0.0}[format]


@gluon.constexpr_function
def step_of(format: str, part: int) -> float:
    """Returns what 1 is as values of a part are multiplied: the high halves of bytes are left in
    their place."""
    if format == "fp8":
        return 1.0
    return 2.0**-20 if format == "int4" and part % 2 else 2.0**-24


@gluon.constexpr_function
def products_layout(warps: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.jit
def _in_key_order(x, FORMAT: gl.constexpr):
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
    """Returns [..., 2, 2] of float16 of each word [...]: pairs of numbers."""
    a, b, c, d = gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [words], dtype=(gl.float16,) * 4, is_pure=True, pack=1
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
        dtype=(gl.float16,) * 8,
        is_pure=True,
        pack=1,
    )
    low = gl.join(gl.join(a, c), gl.join(b, d))
    return low, gl.join(gl.join(e, g), gl.join(f, h))


@gluon.jit
def _pairs_of(words, FORMAT: gl.constexpr):
    """Returns the numbers of words as a tuple of parts of words [..., 2, 2]: of fp8 in the order
    that they lie in, else those of bytes 0 and 2 first."""
    if FORMAT == "int4":
        return _halves(words)
    elif FORMAT == "int8":
        return (_two(words, FROM_BYTES),)
    else:
        return (_two(words, FROM_FP8),)


@gluon.jit
def _key_part(low, high, mma: gl.constexpr):
    """Returns a part of keys [W, TOKENS, PART], ordered as queries are, of the numbers [W, 8,
    WORDS, 2, 2] of the first and of the other tokens."""
    W: gl.constexpr = low.shape[0]
    WORDS: gl.constexpr = low.shape[2]
    LOW: gl.constexpr = 4 if WORDS > 8 else 2
    x = gl.join(low, high).reshape([W, 8, WORDS // (4 * LOW), 4, LOW, 2, 2, 2])
    x = x.permute((0, 7, 1, 2, 4, 5, 3, 6)).reshape([W, TOKENS, 4 * WORDS])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def _crossed(even, odd, FORMAT: gl.constexpr):
    """Returns words [..., 2] whose pairs are the same number of two tokens: numbers 0 and 1, then 2
    and 3."""
    if FORMAT == "fp8":
        first, second = _by_bytes(even, odd, "0x5140", "0x7362")
    else:
        first, second = _by_bytes(even, odd, "0x5410", "0x7632")
    return gl.join(first, second)


@gluon.jit
def _by_bytes(x, y, FIRST: gl.constexpr, SECOND: gl.constexpr):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, " + FIRST + "; prmt.b32 $1, $2, $3, " + SECOND + ";",
        "=&r,=r,r,r",
        [x, y],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _value_part(low, high, mma: gl.constexpr):
    """Returns a part of values [W, PART, TOKENS]: row 8 i + g has number g * PART / 8 + i. Of the
    numbers [W, 4, WORDS, 2, 2, 2] of tokens 2 i and 2 i + 1 (last of all), and of 8 more."""
    W: gl.constexpr = low.shape[0]
    WORDS: gl.constexpr = low.shape[2]
    x = gl.join(low, high).reshape([W, 4, 8, WORDS // 8, 2, 2, 2, 2])
    x = x.permute((0, 3, 4, 5, 2, 7, 1, 6)).reshape([W, 4 * WORDS, TOKENS])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def load_queries(q, first_row, GROUP: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                 FORMAT: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """Returns rows q [.., D] from first_row on as a tuple of parts [W, PART, HEADS], 0 beyond
    GROUP, in the order that keys have; and what their scores begin with."""
    PART: gl.constexpr = part_size(FORMAT, D)
    W: gl.constexpr = mma.warps_per_cta[0]
    each: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, PART // 32], [1, 32], [W, 1], [1, 0])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, wide))[:, None]
    at = q + (first_row + head) * D + gl.arange(0, PART, gl.SliceLayout(0, wide))[None, :]
    parts = ()
    origins = ()
    for i in gl.static_range(D // PART):
        part = gl.load(at + i * PART, mask=head < GROUP, other=0.0).to(gl.float16)
        origin = gl.zeros([W, TOKENS, HEADS], gl.float32, mma)
        if bias_of(FORMAT) != 0:
            sums = gl.sum(part.to(gl.float32), 1) * (-bias_of(FORMAT) * STEP)
            sums = gl.convert_layout(sums, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
            origin = origin + sums[None, :][:, None, :]
        if step_of(FORMAT, i) > STEP and FORMAT != "fp8":
            part = part * 0.0625  # as the numbers are larger
        part = _in_key_order(part, FORMAT).permute((1, 0))
        part = gl.convert_layout(part, gl.SliceLayout(0, each)).expand_dims(0)
        parts = parts + (part.broadcast_to([W, PART, HEADS]),)
        origins = origins + (origin,)
    return parts, origins


@gluon.jit
def scores(queries, words, scales, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns k q^T, float32 [W, TOKENS, HEADS], times `step_of` part 0."""
    parts, origins = queries
    LOADS: gl.constexpr = len(words) // 2
    s = gl.zeros([words[0].shape[0], TOKENS, parts[0].shape[2]], gl.float32, mma)
    if FORMAT == "int4":
        lows, highs = blocks_of(words[:LOADS], True), blocks_of(words[LOADS:], True)
    else:
        lows, highs = words[:LOADS], words[LOADS:]
    EACH: gl.constexpr = len(parts) // len(lows)
    for i in gl.static_range(len(lows)):
        first, other = _pairs_of(lows[i], FORMAT), _pairs_of(highs[i], FORMAT)
        for j in gl.static_range(EACH):
            k = _key_part(first[j], other[j], mma)
            dots = mma_v2(k, parts[EACH * i + j], origins[EACH * i + j])
            s += dots * scales[EACH * i + j][:, :, None]
    return s


@gluon.jit
def _by_thread(w):
    """Returns the sums of [W, TOKENS, HEADS] over those tokens that a thread has, [W, 4, HEADS]."""
    W: gl.constexpr = w.shape[0]
    HEADS: gl.constexpr = w.shape[2]
    return gl.sum(gl.sum(w.reshape([W, 2, 4, 2, HEADS]), 3), 1)


@gluon.jit
def add_values(
    sums, weights, by, p, words, scales, inverse, FORMAT: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """Returns sums * by + v^T p, a tuple of parts [W, PART, HEADS] times `step_of` each part, in
    units of 1 / inverse [W]; and their weights, [W, 4, HEADS] for each part, where numbers have a
    bias. Weights p [W, TOKENS, HEADS] are at most 1."""
    LOADS: gl.constexpr = len(words) // 4
    a, b, c, d = (
        words[:LOADS],
        words[LOADS : 2 * LOADS],
        words[2 * LOADS : 3 * LOADS],
        words[3 * LOADS :],
    )
    if FORMAT == "int4":
        a, b = blocks_of(a, False), blocks_of(b, False)
        c, d = blocks_of(c, False), blocks_of(d, False)
    EACH: gl.constexpr = len(sums) // len(a)
    each: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    # As they leave the softmax weights are not where products want them.
    p = gl.convert_layout(p.to(gl.float16), each).to(gl.float32)
    p = p * inverse[:, None, None]  # times scales alone they might be too small for float16
    added = ()
    heavier = ()
    for i in gl.static_range(len(a)):
        first = _pairs_of(_crossed(a[i], b[i], FORMAT), FORMAT)
        other = _pairs_of(_crossed(c[i], d[i], FORMAT), FORMAT)
        for j in gl.static_range(EACH):
            w = p * scales[EACH * i + j][:, :, None]
            v = _value_part(first[j], other[j], mma)
            shrunk = sums[EACH * i + j] * by[:, None, :]
            added = added + (mma_v2(v, w.to(gl.float16), shrunk),)
            if bias_of(FORMAT) != 0:
                more = _by_thread(w)
                less = gl.convert_layout(by, gl.SliceLayout(1, more.type.layout))[:, None, :]
                heavier = heavier + (weights[EACH * i + j] * less + more,)
    return added, heavier


@gluon.jit
def no_sums(D: gl.constexpr, HEADS: gl.constexpr, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns what `add_values` begins with: sums, weights."""
    W: gl.constexpr = mma.warps_per_cta[0]
    PART: gl.constexpr = part_size(FORMAT, D)
    zeros = gl.zeros([W, TOKENS, HEADS], gl.float32, gl.DotOperandLayout(1, mma, 2))
    none = _by_thread(zeros)
    sums = ()
    weights = ()
    for _ in gl.static_range(D // PART):
        sums = sums + (gl.zeros([W, PART, HEADS], gl.float32, mma),)
        if bias_of(FORMAT) != 0:
            weights = weights + (none,)
    return sums, weights


@gluon.jit
def finished(sums, weights, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns the sums of values times weights, of what `add_values` returned."""
    done = ()
    for i in gl.static_range(len(sums)):
        x = sums[i] * (1.0 / step_of(FORMAT, i))
        if bias_of(FORMAT) != 0:
            weight = gl.convert_layout(gl.sum(weights[i], 1), gl.SliceLayout(1, mma))
            x = x - (weight * bias_of(FORMAT))[:, None, :]
        done = done + (x,)
    return done


@gluon.jit
def largest(scales):
    """Returns [W]: the largest of a tile's scales, within what may be a unit."""
    top = scales[0]
    for i in gl.static_range(1, len(scales)):
        top = gl.maximum(top, scales[i])
    return gl.minimum(gl.max(top, 1), MOST_UNIT)


@gluon.jit
def inverse_of(x):
    """Returns about 1 / x, of a unit."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
