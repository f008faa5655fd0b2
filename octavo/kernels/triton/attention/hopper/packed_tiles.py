"""Tiles of compressed keys and values, from global memory into the registers of products.

Called by lone.py. Every warp has tiles of its own: TOKENS tokens, keys as rows of their product
with queries and values as columns of theirs with weights, so that what a thread loads is what it
multiplies, once unpacked; nothing passes through shared memory. To that end the numbers of a vector
are taken in another order than they lie in: dot products do not mind, and queries and sums are put
in that order, or back, once a program.

A PART of a vector is what shares a scale: all of it, of int4 32 numbers. Tensors are [W, ...], W
the warps. docs/kv_formats.md has the layout in memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from octavo.formats import KV_FORMATS
from octavo.kernels.triton.tiles.numbers import FROM_FP8, FROM_INT4, FROM_INT8

TOKENS = gl.constexpr(16)
"""Tokens of a warp's tile: all of one page."""


@gluon.constexpr_function
def part_size(format: str, size: int) -> int:
    """Returns the numbers of a part of vectors of `size`."""
    return size // KV_FORMATS[format].num_scales(size)


@gluon.constexpr_function
def num_loads(format: str, size: int) -> int:
    """Returns in how many pieces a vector is loaded: of int4 two parts are the halves of one."""
    return size // 64 if format == "int4" else 1


@gluon.constexpr_function
def products_layout(warps: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _bits(count: int, first: int) -> list[list[int]]:
    """Bases of `count` words, a power of two, the first of them `first`."""
    return [[0, 0, first << i] for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def key_words(warps: int, words: int) -> gl.DistributedLinearLayout:
    """Of words [W, TOKENS, words]: each thread those of two tokens, four or two words at a time."""
    low = min(4, words // 4)
    return gl.DistributedLinearLayout(
        [*_bits(low, 1), *_bits(words // (4 * low), 4 * low), [0, 8, 0]],
        [*_bits(4, low), [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)],
        [],
        [warps, 16, words],
    )


@gluon.constexpr_function
def value_words(warps: int, words: int) -> gl.DistributedLinearLayout:
    """Of words [W, TOKENS, words]: each thread an eighth of those of four tokens."""
    return gl.DistributedLinearLayout(
        [*_bits(words // 8, 1), [0, 1, 0], [0, 8, 0]],
        [[0, 2, 0], [0, 4, 0], *_bits(8, words // 8)],
        [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)],
        [],
        [warps, 16, words],
    )


@gluon.jit
def _in_key_order(x, PART: gl.constexpr):
    """Returns x [ROWS, PART] with its columns as they are in rows of keys: those of a thread, of
    every 16, are what it takes from memory in one piece."""
    LOW: gl.constexpr = 4 if PART > 32 else 2
    ROWS: gl.constexpr = x.shape[0]
    x = x.reshape([ROWS, PART // (16 * LOW), 4, LOW, 2, 2])
    return x.permute((0, 1, 3, 4, 2, 5)).reshape([ROWS, PART])


@gluon.jit
def _by_ptx(words, ASM: gl.constexpr):
    """Returns [..., 4] of float16: the numbers of each word."""
    first, second, third, fourth = gl.inline_asm_elementwise(
        ASM,
        "=h,=h,=h,=h,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    return gl.join(gl.join(first, third), gl.join(second, fourth))


@gluon.jit
def _numbers(words, FORMAT: gl.constexpr, HALF: gl.constexpr):
    """Returns the numbers of words, without scales: of int4 those in the HALF halves of bytes."""
    if FORMAT == "int8":
        numbers = _by_ptx(words, FROM_INT8)
    elif FORMAT == "fp8":
        numbers = _by_ptx(words, FROM_FP8)
    elif HALF == 0:
        numbers = _by_ptx(words << 4, FROM_INT4)
    else:
        numbers = _by_ptx(words, FROM_INT4)
    return numbers


@gluon.jit
def _key_part(words, FORMAT: gl.constexpr, HALF: gl.constexpr, mma: gl.constexpr):
    """Returns a part of keys [W, TOKENS, PART], ordered as queries are."""
    W: gl.constexpr = words.shape[0]
    T: gl.constexpr = words.shape[1]
    WORDS: gl.constexpr = words.shape[2]
    LOW: gl.constexpr = 4 if WORDS > 8 else 2
    x = _numbers(words, FORMAT, HALF).reshape([W, T, WORDS // (4 * LOW), 4, LOW, 2, 2])
    x = x.permute((0, 1, 2, 4, 5, 3, 6)).reshape([W, T, 4 * WORDS])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def _value_part(words, FORMAT: gl.constexpr, HALF: gl.constexpr, mma: gl.constexpr):
    """Returns a part of values [W, PART, TOKENS]: row 8 i + g has number g * PART / 8 + i."""
    W: gl.constexpr = words.shape[0]
    T: gl.constexpr = words.shape[1]
    WORDS: gl.constexpr = words.shape[2]
    x = _numbers(words, FORMAT, HALF).reshape([W, T, 8, WORDS // 8, 2, 2])
    x = x.permute((0, 3, 4, 5, 2, 1)).reshape([W, 4 * WORDS, T])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def load_words(
    plane, page, inside, live, STRIDE: gl.constexpr, D: gl.constexpr, FORMAT: gl.constexpr,
    IS_KEY: gl.constexpr,
):  # fmt: skip
    """Returns the words of vectors of TOKENS tokens of pages `page` [W] from `inside` [W] on, of
    which `live` [W] are visible: a tuple of `num_loads`. STRIDE: vectors of a token."""
    LOADS: gl.constexpr = num_loads(FORMAT, D)
    BYTES: gl.constexpr = D // 2 if FORMAT == "int4" else D
    WORDS: gl.constexpr = BYTES // LOADS // 4
    layout: gl.constexpr = (key_words if IS_KEY else value_words)(page.shape[0], WORDS)
    rows: gl.constexpr = gl.SliceLayout(2, layout)
    one: gl.constexpr = gl.SliceLayout(1, rows)
    numbers, _, stride, _, _ = plane
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, rows))[None, :]
    first = page * stride + inside * (STRIDE * BYTES)
    at = gl.convert_layout(first, one)[:, None] + token * (STRIDE * BYTES)
    mask = (token < gl.convert_layout(live, one)[:, None])[:, :, None]
    there = (numbers + at).to(gl.pointer_type(gl.int32))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    loaded = ()
    for i in gl.static_range(LOADS):
        at_words = there[:, :, None] + (i * WORDS + word)
        loaded = loaded + (gl.load(at_words, mask=mask, other=0),)
    return loaded


@gluon.constexpr_function
def _scale_layout(warps: int, count: int, is_key: bool) -> gl.DistributedLinearLayout:
    """Of scales [W, TOKENS, count]: each thread those of the tokens that it has scores, or weights
    as columns of a product, of."""
    none, tokens = [[0, 0, 0]], [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [*_bits(count, 1), *([] if is_key else [[0, 1, 0]]), [0, 8, 0]],
        none * 2 + tokens if is_key else tokens[1:] + none * 3,
        [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)],
        [],
        [warps, 16, count],
    )


@gluon.jit
def _four(x):
    """Returns the columns of [W, TOKENS, 4]."""
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1], 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _columns(x):
    """Returns the columns of [W, TOKENS, 1, 2, 4 or 8]."""
    W: gl.constexpr = x.shape[0]
    T: gl.constexpr = x.shape[1]
    if x.shape[2] == 1:
        return (x.reshape([W, T]),)
    elif x.shape[2] == 2:
        return gl.split(x)
    elif x.shape[2] == 4:
        return _four(x)
    else:
        even, odd = gl.split(x.reshape([W, T, 4, 2]))
        a, c, e, g = _four(even)
        b, d, f, h = _four(odd)
        return a, b, c, d, e, f, g, h


@gluon.jit
def load_scales(
    plane, page, inside, live, STRIDE: gl.constexpr, COUNT: gl.constexpr, IS_KEY: gl.constexpr,
    tokens: gl.constexpr,
):  # fmt: skip
    """Returns COUNT scales of each token as bfloat16 [W, TOKENS] in layout `tokens`; 0 if
    hidden."""
    layout: gl.constexpr = _scale_layout(page.shape[0], COUNT, IS_KEY)
    rows: gl.constexpr = gl.SliceLayout(2, layout)
    one: gl.constexpr = gl.SliceLayout(1, rows)
    _, scales, _, stride, head = plane
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, rows))[None, :]
    column = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    first = page * stride + inside * (STRIDE * COUNT) + head * COUNT
    at = gl.convert_layout(first, one)[:, None] + token * (STRIDE * COUNT)
    mask = (token < gl.convert_layout(live, one)[:, None])[:, :, None]
    columns = _columns(gl.load(scales + at[:, :, None] + column, mask=mask, other=0.0))
    loaded = ()
    for i in gl.static_range(COUNT):
        loaded = loaded + (gl.convert_layout(columns[i], tokens),)
    return loaded


@gluon.jit
def load_queries(q, first_row, GROUP: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
                 PART: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """Returns rows q [.., D] from first_row on as a tuple of parts [W, PART, HEADS], 0 beyond
    GROUP, in the order that keys have."""
    W: gl.constexpr = mma.warps_per_cta[0]
    each: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, PART // 32], [1, 32], [W, 1], [1, 0])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, wide))[:, None]
    at = q + (first_row + head) * D + gl.arange(0, PART, gl.SliceLayout(0, wide))[None, :]
    parts = ()
    for i in gl.static_range(D // PART):
        part = gl.load(at + i * PART, mask=head < GROUP, other=0.0).to(gl.float16)
        part = _in_key_order(part, PART).permute((1, 0))
        part = gl.convert_layout(part, gl.SliceLayout(0, each)).expand_dims(0)
        parts = parts + (part.broadcast_to([W, PART, HEADS]),)
    return parts


@gluon.jit
def scores(queries, words, scales, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns k q^T, float32 [W, TOKENS, HEADS]."""
    PARTS: gl.constexpr = len(queries)
    HALVES: gl.constexpr = PARTS // len(words)
    HEADS: gl.constexpr = queries[0].shape[2]
    zero = gl.zeros([words[0].shape[0], TOKENS, HEADS], gl.float32, mma)
    s = zero
    for i in gl.static_range(PARTS):
        k = _key_part(words[i // HALVES], FORMAT, i % HALVES, mma)
        s += mma_v2(k, queries[i], zero) * scales[i].to(gl.float32)[:, :, None]
    return s


@gluon.jit
def add_values(sums, p, words, scales, unit, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns sums + v^T p, a tuple of parts [W, PART, HEADS], in units of `unit` [W]; weights p
    [W, TOKENS, HEADS] are at most 1."""
    PARTS: gl.constexpr = len(sums)
    HALVES: gl.constexpr = PARTS // len(words)
    # As they leave the softmax weights are not where products want them.
    p = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(1, mma, 2)).to(gl.float32)
    by = 1.0 / unit[:, None]
    added = ()
    for i in gl.static_range(PARTS):
        # Weights times scales alone might be too small for float16.
        w = p * (scales[i].to(gl.float32) * by)[:, :, None]
        v = _value_part(words[i // HALVES], FORMAT, i % HALVES, mma)
        added = added + (mma_v2(v, w.to(gl.float16), sums[i]),)
    return added


@gluon.jit
def largest(scales):
    """Returns [W]: the largest of a tile's scales."""
    top = scales[0].to(gl.float32)
    for i in gl.static_range(1, len(scales)):
        top = gl.maximum(top, scales[i].to(gl.float32))
    return gl.max(top, 1)
