"""What may be drawn: bits of allowed ids and short lists of biases, put on logits where they lie.

Called by `octavo.runner.device_sampler` before all that looks at logits. Touches only rows that it
is told of; never waits for the device.

Shape legend: S sampled rows, M masked ones, W words of a mask, B biased logits, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable

CHUNK = 4096
BIASES = 256
LOWEST = tl.constexpr(-1e30)
"""An allowed id stays possible even where the model's own logit is minus infinity."""


@launchable
@triton.jit
def mask_kernel(
    logits_SV, places_M, words_MW, vocab_size, row_stride, num_words, CHUNK: tl.constexpr
):
    """x = bit of the id ? max(x, LOWEST) : -inf; a row with a NaN or nothing finite stays as it is,
    and shows so that it is broken.

    Id t of row places[m] is bit t % 32 of words[m, t // 32].
    """
    m = tl.program_id(0)
    at = logits_SV + tl.load(places_M + m).to(tl.int64) * row_stride
    words = words_MW + m.to(tl.int64) * num_words
    best = tl.full([CHUNK], -float("inf"), tl.float32)
    for start in range(0, vocab_size, CHUNK):
        token = start + tl.arange(0, CHUNK)
        x = tl.load(at + token, mask=token < vocab_size, other=-float("inf"))
        best = tl.maximum(best, tl.where(x == x, x, float("inf")))
    top = tl.max(best, 0)
    if (top == float("inf")) | (top == -float("inf")):
        return
    for start in range(0, vocab_size, CHUNK):
        token = start + tl.arange(0, CHUNK)
        is_token = token < vocab_size
        word = tl.load(words + token // 32, mask=is_token, other=0)
        is_allowed = ((word >> (token % 32)) & 1) != 0
        x = tl.load(at + token, mask=is_token, other=0.0)
        x = tl.where(is_allowed, tl.maximum(x, LOWEST), -float("inf"))
        tl.store(at + token, x, mask=is_token)


@launchable
@triton.jit(do_not_specialize=["num_biases"])
def bias_kernel(logits_SV, places_B, ids_B, values_B, num_biases, row_stride, BIASES: tl.constexpr):
    """logits[places[b], ids[b]] += values[b]; no two are the same logit."""
    b = tl.program_id(0) * BIASES + tl.arange(0, BIASES)
    is_there = b < num_biases
    row = tl.load(places_B + b, mask=is_there, other=0).to(tl.int64)
    token = tl.load(ids_B + b, mask=is_there, other=0)
    value = tl.load(values_B + b, mask=is_there, other=0).to(tl.float32, bitcast=True)
    at = logits_SV + row * row_stride + token
    tl.store(at, tl.load(at, mask=is_there, other=0.0) + value, mask=is_there)


def mask_logits(logits_SV: Tensor, places_M: Tensor, words_MW: Tensor) -> None:
    """Makes all ids of the rows at `places_M` impossible but those whose bits are set.

    logits float32; places int32 [M] and words int32 [M, ceil(V / 32)] on the device.
    """
    num_rows, num_words = words_MW.shape
    vocab_size = logits_SV.shape[1]
    assert num_words == cdiv(vocab_size, 32), (num_words, vocab_size)
    mask_kernel[(num_rows,)](
        logits_SV,
        places_M,
        words_MW,
        vocab_size,
        logits_SV.stride(0),
        num_words,
        CHUNK=CHUNK,
        num_warps=16,
    )


def bias_logits(logits_SV: Tensor, places_B: Tensor, ids_B: Tensor, values_B: Tensor) -> None:
    """Adds `values_B` (float32 as the bits of int32) to the logits at rows `places_B`, ids `ids_B`;
    all int32 [B] on the device."""
    num_biases = len(places_B)
    bias_kernel[(cdiv(num_biases, BIASES),)](
        logits_SV,
        places_B,
        ids_B,
        values_B,
        num_biases,
        logits_SV.stride(0),
        BIASES=BIASES,
        num_warps=4,
    )
