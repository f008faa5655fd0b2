"""One token a row: the best, or a draw.

Called by `octavo.runner.device_sampler` after the thresholds.

A draw is Gumbel-max: argmax of logit / T - log(E) with E exponential, an exact sample of the
softmax over the kept ids. E of (sequence, output, token) is a word of the Philox of
`octavo.runner.random`: counter (token // 4, output index, 0, 0), word token % 4, key the seed.

Shape legend: S sampled rows, R persistent rows, F fields, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.sampling.params import (
    CHUNK,
    FIELDS,
    INV_TEMPERATURE,
    MIN_P,
    SEED_HIGH,
    SEED_LOW,
    SLOT,
    TOP_K,
    TOP_P,
    finite,
    real,
)


@triton.jit
def _gumbel(params, output_index, first, CHUNK: tl.constexpr):
    """-log(E) for tokens first .. first + CHUNK, E = -log(1 - v), v = (word + 1/2) / 2**32."""
    low = tl.load(params + SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(params + SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    four = first // 4 + tl.arange(0, CHUNK // 4)
    none = output_index * 0
    a, b, c, d = tl.philox((high << 32) | low, four, output_index, none, none)
    word = tl.join(tl.join(a, c), tl.join(b, d)).reshape(CHUNK)
    v = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    # The winner's E is small, where 1 - v has no digits left.
    small = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    return -tl.log(tl.where(v < 1 / 16, small, -tl.log(1 - v)))


@launchable
@triton.jit
def choose_kernel(
    logits_SV,
    batch_S2,
    params_RF,
    thresholds_S2,
    tops_SC,
    scores_SC,
    ids_SC,
    vocab_size,
    row_stride,
    CHUNK: tl.constexpr,
):
    """For every chunk of every row: its best logit, and the token that wins with its score.

    Greedy: the token of the best logit. Else score = (x - best) / T - log(E) over the kept ids.
    A NaN shows as a best of inf.
    """
    i, chunk = tl.program_id(0), tl.program_id(1)
    params = params_RF + tl.load(batch_S2 + 2 * i) * FIELDS
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    at = logits_SV + i.to(tl.int64) * row_stride + token
    x = tl.load(at, mask=token < vocab_size, other=-float("inf"))
    x = tl.where(x == x, x, float("inf"))
    top, best = tl.max(x, 0, return_indices=True)
    score = finite(top) * 0
    inv_temperature = real(params, INV_TEMPERATURE)
    if inv_temperature > 0:
        z = (x - finite(top)) * inv_temperature
        z += _gumbel(params, tl.load(batch_S2 + 2 * i + 1), chunk * CHUNK, CHUNK)
        top_k = tl.load(params + TOP_K)
        if (real(params, MIN_P) > 0) | (top_k > 0) | (real(params, TOP_P) < 1):
            least = real(thresholds_S2, 2 * i)
            last = tl.load(thresholds_S2 + 2 * i + 1)
            is_kept = (x > least) | ((x == least) & (token <= last))
            z = tl.where(is_kept, z, -float("inf"))
        score, best = tl.max(z, 0, return_indices=True)
    at = i * tl.num_programs(1) + chunk
    tl.store(tops_SC + at, top)
    tl.store(scores_SC + at, score)
    tl.store(ids_SC + at, chunk * CHUNK + best)


@launchable
@triton.jit
def merge_kernel(
    batch_S2,
    params_RF,
    tops_SC,
    scores_SC,
    ids_SC,
    token_ids_S,
    last_sampled_R,
    counts,
    vocab_size,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """The winner over a row's chunks, of equal ones the first; -1 where the best of all logits is
    not finite, or it is no id. Writes it to the row, and counts it where the row has a slot."""
    i = tl.program_id(0)
    row = tl.load(batch_S2 + 2 * i)
    params = params_RF + row * FIELDS
    chunk = tl.arange(0, CHUNKS)
    is_in = chunk < num_chunks
    tops = tl.load(tops_SC + i * num_chunks + chunk, mask=is_in, other=-float("inf"))
    scores = tl.load(scores_SC + i * num_chunks + chunk, mask=is_in, other=-float("inf"))
    ids = tl.load(ids_SC + i * num_chunks + chunk, mask=is_in, other=0)
    top = tl.max(tops, 0)
    inv_temperature = real(params, INV_TEMPERATURE)
    scale = tl.where(inv_temperature > 0, inv_temperature, 1.0)  # greedy scores are 0
    _, best = tl.max((tops - finite(top)) * scale + scores, 0, return_indices=True)
    token = tl.sum(tl.where(chunk == best, ids, 0), 0)
    is_broken = (top == float("inf")) | (top == -float("inf")) | (token >= vocab_size)
    tl.store(token_ids_S + i, tl.where(is_broken, -1, token))
    tl.store(last_sampled_R + row, tl.where(is_broken, 0, token))
    slot = tl.load(params + SLOT).to(tl.int64)
    if (slot >= 0) & (is_broken == 0):
        at = counts + slot * vocab_size + token
        tl.store(at, tl.load(at) + 2)


def choose(
    logits_SV: Tensor,
    batch_S2: Tensor,
    params_RF: Tensor,
    thresholds_S2: Tensor,
    last_sampled_R: Tensor,
    counts: Tensor,
) -> Tensor:
    """Returns token ids int32 [S], -1 for a row with a NaN or nothing finite; writes
    `last_sampled_R` (0 for such a row) and adds to `counts`.

    `thresholds_S2` is read for rows with top_k, top_p or min_p only.
    """
    num_rows, vocab_size = logits_SV.shape
    num_chunks = cdiv(vocab_size, CHUNK)
    # Not halves of one tensor: the second would lie at no multiple of 16 bytes.
    tops = logits_SV.new_empty((num_rows, num_chunks))
    scores = torch.empty_like(tops)
    ids = batch_S2.new_empty((num_rows, num_chunks))
    token_ids = batch_S2.new_empty(num_rows)
    choose_kernel[(num_rows, num_chunks)](
        logits_SV,
        batch_S2,
        params_RF,
        thresholds_S2,
        tops,
        scores,
        ids,
        vocab_size,
        logits_SV.stride(0),
        CHUNK=CHUNK,
        num_warps=8,
    )
    merge_kernel[(num_rows,)](
        batch_S2,
        params_RF,
        tops,
        scores,
        ids,
        token_ids,
        last_sampled_R,
        counts,
        vocab_size,
        num_chunks,
        CHUNKS=next_power_of_2(num_chunks),
        num_warps=1,
    )
    return token_ids
