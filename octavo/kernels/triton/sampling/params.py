"""What the sampling kernels know of a row."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

ROW_PARAMS = np.dtype(
    [
        ("inv_temperature", np.float32),  # 0: greedy
        ("min_p", np.float32),
        ("top_k", np.int32),  # 0: all
        ("top_p", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("seed", np.uint64),
        ("slot", np.int32),  # row of the table of counts, -1 without penalties
    ]
)
"""What the kernels know of a persistent row; on the device int32 [R, F], as the bytes lie."""

INV_TEMPERATURE = tl.constexpr(0)
MIN_P = tl.constexpr(1)
TOP_K = tl.constexpr(2)
TOP_P = tl.constexpr(3)
REPETITION = tl.constexpr(4)
FREQUENCY = tl.constexpr(5)
PRESENCE = tl.constexpr(6)
SEED_LOW = tl.constexpr(7)
SEED_HIGH = tl.constexpr(8)
SLOT = tl.constexpr(9)
FIELDS = tl.constexpr(ROW_PARAMS.itemsize // 4)

CHUNK = 4096
"""Logits of one program of `choose`; fixed, because scores are taken relative to a chunk's best."""


@triton.jit
def real(params, field):
    return tl.load(params + field).to(tl.float32, bitcast=True)


@triton.jit
def finite(x):
    """x, or 0 where differences to it would be NaN."""
    return tl.where((x > -float("inf")) & (x < float("inf")), x, 0.0)
