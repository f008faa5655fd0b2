"""Products with compressed keys and values.

Called by lone.py and packed_softmax.py on what packed_tiles.py loaded. Keys are rows of their
product with queries and values columns of theirs with weights, so that what a thread loads is what
it multiplies, once unpacked (packed_numbers.py). To that end the numbers of a vector are taken in
another order than they lie in: dot products do not mind, and queries and sums are put in that
order, or back, once a program.

A PART of a vector is what shares a scale: all of it, of int4 32 numbers. Tensors are [W, ...], W
the warps. Numbers are multiplied as they lie in their words: with nothing above them, their bits
are those of a float16 that is so many times the least (keys), or of a bfloat16 (values; e4m3 is one
once shifted). They are `bias_of` too large (int8 in excess 128), which is taken off sums: it costs
less than taking it off each number.

Weights are bfloat16 because of its exponents: with them they need be neither relative to the
largest score nor to the largest scale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from octavo.formats import KV_FORMATS
from octavo.kernels.triton.attention.hopper.packed_numbers import (
    crossed,
    in_key_order,
    key_part,
    pairs_of,
    value_part,
)
from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS, blocks_of

STEP = gl.constexpr(2.0**-24)
"""The least float16."""
RAISED = gl.constexpr(60)
"""Weights are 2^RAISED times what they should be: their products with numbers are so small."""


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
    """Returns what 1 is as keys of a part are multiplied: the high halves of bytes are left in
    their place."""
    if format == "fp8":
        return 1.0
    return 2.0**-20 if format == "int4" and part % 2 else 2.0**-24


@gluon.constexpr_function
def _raised_step(format: str, part: int) -> float:
    """Returns what 1 is in sums of values with weights that are RAISED."""
    if format == "fp8":
        return 2.0 ** (RAISED.value - 120)
    return 2.0 ** (RAISED.value - (129 if format == "int4" and part % 2 else 133))


@gluon.constexpr_function
def products_layout(warps: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


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
    excess = ()
    for i in gl.static_range(D // PART):
        part = gl.load(at + i * PART, mask=head < GROUP, other=0.0).to(gl.float16)
        excess = excess + (gl.sum(part.to(gl.float32), 1) * (-bias_of(FORMAT) * STEP),)
        if step_of(FORMAT, i) > STEP and FORMAT != "fp8":
            part = part * 0.0625  # as the numbers are larger
        part = in_key_order(part, FORMAT).permute((1, 0))
        part = gl.convert_layout(part, gl.SliceLayout(0, each)).expand_dims(0)
        parts = parts + (part.broadcast_to([W, PART, HEADS]),)
    return parts, _origins(excess, HEADS, FORMAT, mma)


@gluon.jit
def _origins(excess, HEADS: gl.constexpr, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns what takes the excess of each part, [HEADS], off scores: what products begin with; of
    int4 what scales are multiplied with, as `scale_rows` has them, four parts at a time."""
    W: gl.constexpr = mma.warps_per_cta[0]
    origins = ()
    if len(excess) == 1:
        x = gl.convert_layout(excess[0], gl.SliceLayout(0, gl.SliceLayout(1, mma)))
        origins = (gl.zeros([W, TOKENS, HEADS], gl.float32, mma) + x[None, :][:, None, :],)
    else:
        each: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        flat: gl.constexpr = gl.SliceLayout(0, each)
        k = gl.arange(0, 16, gl.SliceLayout(1, flat))[:, None]
        x = gl.zeros([16, HEADS], gl.bfloat16, flat)
        for i in gl.static_range(len(excess)):
            left = gl.convert_layout(excess[i], gl.SliceLayout(0, flat))[None, :]
            for piece in gl.static_range(3):  # of bfloat16, which are all of it
                high = left.to(gl.bfloat16)
                left = left - high.to(gl.float32)
                is_here = k == (i % 4 // 2) * 8 + piece * 2 + i % 2
                x = gl.where(is_here, high.broadcast_to([16, HEADS]), x)
            if i % 4 == 3 or i == len(excess) - 1:
                origins = origins + (x.expand_dims(0).broadcast_to([W, 16, HEADS]),)
                x = gl.zeros([16, HEADS], gl.bfloat16, flat)
    return origins


@gluon.jit
def scores(queries, words, scales, rows, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns k q^T, float32 [W, TOKENS, HEADS], times `step_of` part 0. Scales as `scales_of` has
    them, and as `scale_rows` does."""
    parts, origins = queries
    LOADS: gl.constexpr = len(words) // 2
    none = gl.zeros([words[0].shape[0], TOKENS, parts[0].shape[2]], gl.float32, mma)
    s = none
    if len(parts) > 1:
        for i in gl.static_range(len(origins)):
            s = mma_v2(rows[i], origins[i], s)
    if FORMAT == "int4":
        lows, highs = blocks_of(words[:LOADS], True), blocks_of(words[LOADS:], True)
    else:
        lows, highs = words[:LOADS], words[LOADS:]
    EACH: gl.constexpr = len(parts) // len(lows)
    for i in gl.static_range(len(lows)):
        first, other = pairs_of(lows[i], FORMAT, True), pairs_of(highs[i], FORMAT, True)
        for j in gl.static_range(EACH):
            k = key_part(first[j], other[j], mma)
            dots = mma_v2(k, parts[EACH * i + j], none if len(parts) > 1 else origins[0])
            s += dots * scales[EACH * i + j][:, :, None]
    return s


@gluon.jit
def weight_pairs(p):
    """Returns weights [W, TOKENS, HEADS], as products leave them, as pairs of bfloat16 of two
    tokens, [W, TOKENS / 2, HEADS], as products take them: 8 x 8 at a time transposed."""
    W: gl.constexpr = p.shape[0]
    HEADS: gl.constexpr = p.shape[2]
    even, odd = gl.split(p.reshape([W, TOKENS, HEADS // 2, 2]))
    pairs = gl.inline_asm_elementwise(
        """{
            .reg .b32 heads;
            cvt.rn.bf16x2.f32 heads, $2, $1;
            movmatrix.sync.aligned.m8n8.trans.b16 $0, heads;
        }""",
        "=r,f,f",
        [even, odd],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    pairs = pairs.reshape([W, TOKENS // 8, 8, HEADS // 8, 4]).permute((0, 1, 4, 3, 2))
    return pairs.reshape([W, TOKENS // 2, HEADS])


@gluon.jit
def _scaled(pairs, scales, mma: gl.constexpr):
    """Returns the weights [W, TOKENS, HEADS] of `weight_pairs` times pairs of scales
    [W, TOKENS / 2]."""
    scales = scales[:, :, None].broadcast_to(pairs.shape)
    even, odd = gl.inline_asm_elementwise(
        "{ .reg .b32 x; mul.rn.bf16x2 x, $2, $3; mov.b32 {$0, $1}, x; }",
        "=h,=h,r,r",
        [pairs, scales],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return _by_token(even, odd, mma)


@gluon.jit
def _by_token(even, odd, mma: gl.constexpr):
    """Returns weights [W, TOKENS, HEADS] of those of even and of odd tokens."""
    W: gl.constexpr = even.shape[0]
    HEADS: gl.constexpr = even.shape[2]
    w = gl.join(even, odd).permute((0, 1, 3, 2)).reshape([W, TOKENS, HEADS])
    return gl.convert_layout(w, gl.DotOperandLayout(1, mma, 2))


@gluon.jit
def _unscaled(pairs, mma: gl.constexpr):
    """Returns the weights [W, TOKENS, HEADS] of `weight_pairs`."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return _by_token(even, odd, mma)


@gluon.jit
def _row_of_ones(i: gl.constexpr, mma: gl.constexpr):
    """Returns [W, 16, TOKENS]: its product with weights has their sums in row i."""
    each: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    W: gl.constexpr = mma.warps_per_cta[0]
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, each)))[None, :][:, :, None]
    ones = gl.where(row == i, 1.0, 0.0).to(gl.bfloat16)
    return ones.broadcast_to([W, 16, TOKENS])


@gluon.jit
def add_values(sums, weights, pairs, words, scales, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns sums + v^T w, a tuple of parts [W, PART, HEADS] times `_raised_step`; and the weights
    of part i in row i of [W, 16, HEADS], where numbers have a bias. `pairs` and `scales` of weights
    as `_scaled` takes them."""
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
    weights = mma_v2(_row_of_ones(len(sums), mma), _unscaled(pairs, mma), weights)
    added = ()
    for i in gl.static_range(len(a)):
        first = pairs_of(crossed(a[i], b[i]), FORMAT, False)
        other = pairs_of(crossed(c[i], d[i]), FORMAT, False)
        for j in gl.static_range(EACH):
            w = _scaled(pairs, scales[EACH * i + j], mma)
            v = value_part(first[j], other[j], mma)
            added = added + (mma_v2(v, w, sums[EACH * i + j]),)
            if bias_of(FORMAT) != 0:
                weights = mma_v2(_row_of_ones(EACH * i + j, mma), w, weights)
    return added, weights


@gluon.jit
def no_sums(D: gl.constexpr, HEADS: gl.constexpr, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns what `add_values` begins with: sums, weights."""
    W: gl.constexpr = mma.warps_per_cta[0]
    PART: gl.constexpr = part_size(FORMAT, D)
    sums = ()
    for _ in gl.static_range(D // PART):
        sums = sums + (gl.zeros([W, PART, HEADS], gl.float32, mma),)
    return sums, gl.zeros([W, 16, HEADS], gl.float32, mma)


@gluon.jit
def finished(sums, weights, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns the sums of values times weights, of what `add_values` returned, without the warps:
    parts [PART, HEADS]; and the sum of weights [HEADS]."""
    done = ()
    for i in gl.static_range(len(sums)):
        x = gl.sum(sums[i], 0) * (1.0 / _raised_step(FORMAT, i))
        if bias_of(FORMAT) != 0:
            weight = gl.convert_layout(_row(weights, i, mma), gl.SliceLayout(0, x.type.layout))
            x = x - (weight * (bias_of(FORMAT) * 2.0**-RAISED))[None, :]
        done = done + (x,)
    return done, _row(weights, len(sums), mma)


@gluon.jit
def _row(weights, i: gl.constexpr, mma: gl.constexpr):
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :][:, :, None]
    return gl.sum(gl.sum(gl.where(row == i, weights, 0.0), 1), 0)
