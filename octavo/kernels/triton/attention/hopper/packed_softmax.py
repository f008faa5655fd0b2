"""The softmax of single queries over compressed keys: scores, weights, and what warps found in one.

Called by lone.py on the tiles that it loaded. Tensors are [W, ...], W the warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.triton.attention.hopper.packed_products import (
    RAISED,
    add_values,
    finished,
    scores,
    weight_pairs,
)
from octavo.kernels.triton.attention.hopper.packed_scales import scale_pairs, scale_rows, scales_of
from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS


@gluon.jit
def visible_scores(
    queries, tile, first, low, end, K: gl.constexpr, FORMAT: gl.constexpr,
    HAS_SHARED: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Returns scores [W, TOKENS, HEADS], -inf where not visible."""
    words, scales = tile
    tokens: gl.constexpr = gl.SliceLayout(2, mma)
    n = gl.convert_layout(first, gl.SliceLayout(1, tokens))[:, None]
    n = n + gl.arange(0, TOKENS, gl.SliceLayout(0, tokens))[None, :]
    rows = scale_rows(scales, len(queries[0]), mma)
    scales = scales_of(scales, gl.program_id(0), K, len(queries[0]), tokens)
    s = scores(queries, words, scales, rows, FORMAT, mma)
    visible = n < end
    if HAS_SHARED:
        visible = visible & (n >= low)
    return gl.where(visible[:, :, None], s, -float("inf"))


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def add_tile(
    state, s, origin, scale_log2, tile, K: gl.constexpr, FORMAT: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """Returns the softmax of each warp with its tile, of scores s, added: weights are
    2^(s * scale_log2 - origin), origin [HEADS].

    State: the largest score and the sum of weights, [W, 8, HEADS] not yet of all tokens, sums
    (parts [W, PART, HEADS]) and weights as `add_values` has them.
    """
    top, sums, weights = state
    words, scales = tile
    p = _exp2(s * scale_log2 - origin[None, :][:, None, :])
    pairs = weight_pairs(p)
    tokens: gl.constexpr = gl.SliceLayout(2, pairs.type.layout)
    scales = scale_pairs(scales, gl.program_id(0), K, len(sums), tokens)
    sums, weights = add_values(sums, weights, pairs, words, scales, FORMAT, mma)
    return gl.maximum(top, higher(s)), sums, weights


@gluon.jit
def higher(s):
    """Returns the larger of a thread's scores, [W, 8, HEADS] of s [W, TOKENS, HEADS]."""
    return gl.max(s.reshape([s.shape[0], 2, 8, s.shape[2]]), 1)


@gluon.jit
def origin_of(top, scale_log2, mma: gl.constexpr):
    """Returns the exponents [HEADS] with which the largest weights, of scores `top` as `higher` has
    them of all warps, are 2^RAISED."""
    return _aligned(gl.max(gl.max(top, 1), 0), mma) * scale_log2 - RAISED


@gluon.jit
def _aligned(x, mma: gl.constexpr):
    """Returns x [HEADS] as it is taken from scores."""
    return gl.convert_layout(x, gl.SliceLayout(0, gl.SliceLayout(1, mma)))


@gluon.jit
def merge_warps(state, origin, FORMAT: gl.constexpr, mma: gl.constexpr):
    """Returns (sums of parts [PART, HEADS] over total, log2-sum-exp2 [HEADS]) of all warps."""
    _, sums, weights = state
    parts, whole = finished(sums, weights, FORMAT, mma)
    whole = _aligned(whole, mma)
    lse = origin + gl.log2(whole)
    whole = whole * 2.0**-RAISED
    means = ()
    for i in gl.static_range(len(parts)):
        inverse = gl.convert_layout(1.0 / whole, gl.SliceLayout(0, parts[i].type.layout))
        means = means + (parts[i] * inverse[None, :],)
    return means, lse


@gluon.jit
def joined(means):
    """Returns the parts [PART, HEADS] of vectors as [HEADS, D]."""
    PART: gl.constexpr = means[0].shape[0]
    HEADS: gl.constexpr = means[0].shape[1]
    if len(means) == 1:
        # Row 8 i + g has number g * PART / 8 + i.
        return means[0].reshape([PART // 8, 8, HEADS]).permute((2, 1, 0)).reshape([HEADS, PART])
    else:
        HALF: gl.constexpr = len(means) // 2
        low, high = joined(means[:HALF]), joined(means[HALF:])
        return gl.join(low, high).permute((0, 2, 1)).reshape([HEADS, 2 * HALF * PART])
