"""What becomes of sums of FP8 products on Hopper: activation, rounding to FP8 again, and stores.

Called by the kernels of experts and of dense products, with sums in either order of dimensions.

Shape legend: R rows of x, N rows of weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.planes import RUN as _RUN

RUN = gl.constexpr(_RUN)
LARGEST = gl.constexpr(448.0)


@gluon.jit
def silu_times(gate, up):
    """Returns silu(gate) * up."""
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def in_words(x, AXIS: gl.constexpr):
    """Returns columns in the order of packed weights: those of a word beside each other."""
    if AXIS == 1:
        runs = x.reshape([x.shape[0], x.shape[1] // (2 * RUN), 2, RUN])
        words = runs.permute((0, 1, 3, 2)).reshape([x.shape[0], x.shape[1]])
    else:
        runs = x.reshape([x.shape[0] // (2 * RUN), 2, RUN, x.shape[1]])
        words = runs.permute((0, 2, 1, 3)).reshape([x.shape[0], x.shape[1]])
    return words


@gluon.jit
def rounded(value, AXIS: gl.constexpr):
    """Returns value as e4m3 and its scales, of which all along AXIS share one."""
    largest = gl.max(gl.abs(value), AXIS)
    scale = gl.maximum(largest, 1e-10) / LARGEST
    number = value * gl.expand_dims(1.0 / scale, AXIS)
    number = gl.minimum(gl.maximum(number, -LARGEST), LARGEST)
    return number.to(gl.float8e4nv), scale


@gluon.constexpr_function
def wide_layout(is_few):
    """Returns the layout in which rows are stored: neighbours of a row by one thread."""
    if is_few:
        return gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])
    return gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])


@gluon.jit
def store_rows(out, value, row, is_row, stride, column, IS_FEW: gl.constexpr):
    """Writes value [R, N] (IS_FEW: [N, R]) to out[row, column + n] where is_row; rows as
    `wide_layout` has them."""
    WEIGHTS: gl.constexpr = 0 if IS_FEW else 1
    wide: gl.constexpr = row.type.layout.parent
    n = column + gl.arange(0, value.shape[WEIGHTS], gl.SliceLayout(1 - WEIGHTS, wide))
    there = gl.expand_dims(row.to(gl.int64) * stride, WEIGHTS) + gl.expand_dims(n, 1 - WEIGHTS)
    live = gl.expand_dims(is_row, WEIGHTS)
    gl.store(out + there, gl.convert_layout(value, wide), mask=live & (there >= 0))
