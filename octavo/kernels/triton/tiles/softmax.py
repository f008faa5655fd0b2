"""The running softmax of attention's tiles, and how sums of parts become one.

Device functions of every attention kernel but Hopper's own; they launch nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_step(s, m, total, acc, scale_log2):
    """Returns p [M, N], and m, total and acc made ready for its sums: online softmax in base 2.

    Scores s count times scale_log2; -inf are not seen. m is the highest scaled score so far, total
    the sum of 2^(score - m), acc the weighted sum [M, D] that p's products are added to. A tile of
    which a row sees nothing leaves the row's bits alone.
    """
    higher = tl.maximum(m, tl.max(s, 1) * scale_log2)
    floor = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s * scale_log2 - floor[:, None])
    shrink = tl.exp2(m - floor)
    return p, higher, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def joined(mean, lse, other, other_lse):
    """Returns mean [M, V] and log2-sum-exp2 [M] over two sets of keys; one of which a row saw
    nothing (-inf) may have any mean."""
    top = tl.maximum(lse, other_lse)
    floor = tl.where(top == -float("inf"), 0.0, top)
    mine, others = tl.exp2(lse - floor), tl.exp2(other_lse - floor)
    total = mine + others
    whole = tl.where(total > 0, total, 1.0)
    other = tl.where(others[:, None] > 0, other * others[:, None], 0.0)
    mean = (mean * mine[:, None] + other) / whole[:, None]
    return mean, tl.where(total > 0, floor + tl.log2(whole), -float("inf"))


@triton.jit
def capped(s, scale_log2, cap_log2):
    """Returns scores that times scale_log2 are cap_log2 * tanh(s * scale_log2 / cap_log2)."""
    bent = 2.0 * tl.sigmoid(s * (2.0 * scale_log2 / cap_log2)) - 1.0
    return bent * (cap_log2 / scale_log2)


@triton.jit
def with_sinks(mean, lse, sinks, mask):
    """Returns the mean [M, D] where sinks take their part of the weights: scores at `sinks` [M]
    that have no value (gpt-oss). lse [M]: log2-sum-exp2 of other scores; -inf: the mean is 0."""
    sink_log2 = tl.load(sinks, mask=mask, other=0.0) * LOG2_E
    return mean * (1.0 / (1.0 + tl.exp2(sink_log2 - lse)))[:, None]
