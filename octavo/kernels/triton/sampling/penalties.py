"""Penalties on logits, in place, for ids that a row has seen.

Called by `octavo.runner.device_sampler`.

Shape legend: S sampled rows, R persistent rows, F fields, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.sampling.params import (
    CHUNK,
    FIELDS,
    FREQUENCY,
    PRESENCE,
    REPETITION,
    SLOT,
    real,
)


@launchable
@triton.jit
def penalise_kernel(
    logits_SV, batch_S2, params_RF, counts, vocab_size, row_stride, CHUNK: tl.constexpr
):
    """x = (x > 0 ? x / repetition : x * repetition) - frequency * n - presence * (n > 0) for ids
    seen in the prompt or put out n times. counts int32 [slots, V]: n << 1 | seen in the prompt."""
    i = tl.program_id(0)
    params = params_RF + tl.load(batch_S2 + 2 * i) * FIELDS
    slot = tl.load(params + SLOT).to(tl.int64)
    if slot < 0:
        return
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    noted = tl.load(counts + slot * vocab_size + token, mask=token < vocab_size, other=0)
    count = (noted >> 1).to(tl.float32)
    repetition = real(params, REPETITION)
    at = logits_SV + i.to(tl.int64) * row_stride + token
    x = tl.load(at, mask=noted != 0, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= real(params, FREQUENCY) * count
    x -= real(params, PRESENCE) * (count > 0).to(tl.float32)
    tl.store(at, x, mask=noted != 0)


def penalise(logits_SV: Tensor, batch_S2: Tensor, params_RF: Tensor, counts: Tensor) -> None:
    """Changes the logits of the rows that have a slot in `counts` int32 [slots, V], in place.

    `batch_S2` int32: the persistent row and the output index of each row of `logits_SV` (float32).
    """
    num_rows, vocab_size = logits_SV.shape
    penalise_kernel[(num_rows, cdiv(vocab_size, CHUNK))](
        logits_SV,
        batch_S2,
        params_RF,
        counts,
        vocab_size,
        logits_SV.stride(0),
        CHUNK=CHUNK,
        num_warps=8,
    )
