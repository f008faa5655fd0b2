"""Rows of activations in FP8, in the order of columns that packed weights have.

Used where FP8 weights meet FP8 activations on tensor cores: words of two numbers as bytes, so that
byte 2 w of a run has column w and byte 2 w + 1 column w + RUN; a sum does not care for the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.planes import RUN as _RUN

RUN = tl.constexpr(_RUN)
LARGEST = tl.constexpr(448.0)


@triton.jit
def column_of_byte(byte):
    """Returns the column that each byte of a row of FP8 weights has."""
    run = byte // (2 * RUN)
    within = byte % (2 * RUN)
    return run * (2 * RUN) + within % 2 * RUN + within // 2
