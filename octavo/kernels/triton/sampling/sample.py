"""Choosing tokens on the device: penalties, what top_k, top_p and min_p leave, one draw per row.

Called by `octavo.runner.device_sampler`, in this order: penalise, find_thresholds, choose. Never
waits for the device, and never lets the bits of a row depend on its neighbours: every kernel has
one variant, sums in an order that the row's length alone decides, and branches by row.

A draw is Gumbel-max: argmax of logit / T - log(E) with E exponential, an exact sample of the
softmax over the kept ids. E of (sequence, output, token) is a word of the Philox of
`octavo.runner.random`: counter (token // 4, output index, 0, 0), word token % 4, key the seed.

Shape legend: S sampled rows, R persistent rows, F fields, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable

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
FILTER_TILE = 4096
FILTER_WARPS = 16
CANDIDATES = 8192
"""Logits that the search for thresholds copies together; with more it walks the whole row."""
NUM_CUTS = tl.constexpr(8)
CUT_NATS = tl.constexpr(2.0)
"""Candidates are looked for 2, 4, ... 16 nats below the best."""


@triton.jit
def _real(params, field):
    return tl.load(params + field).to(tl.float32, bitcast=True)


@triton.jit
def _finite(x):
    """x, or 0 where differences to it would be NaN."""
    return tl.where((x > -float("inf")) & (x < float("inf")), x, 0.0)


@triton.jit
def _flip(bits):
    """From a float's bits to an int32 in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(x):
    return _flip(tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True))  # -0 is 0


@triton.jit
def _value(key):
    return _flip(key).to(tl.float32, bitcast=True)


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
    repetition = _real(params, REPETITION)
    at = logits_SV + i.to(tl.int64) * row_stride + token
    x = tl.load(at, mask=noted != 0, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= _real(params, FREQUENCY) * count
    x -= _real(params, PRESENCE) * (count > 0).to(tl.float32)
    tl.store(at, x, mask=noted != 0)


@triton.jit
def _measure(values, size, least, top, inv_temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """How many of `size` values are at least `least`; BY_MASS, the sum of their weights."""
    lanes = tl.zeros([TILE], tl.float32)
    for start in range(0, size, TILE):
        place = start + tl.arange(0, TILE)
        x = tl.load(values + place, mask=place < size, other=-float("inf"))
        is_in = (x >= least) & (place < size)
        if BY_MASS:
            lanes += tl.where(is_in, tl.exp((x - top) * inv_temperature), 0.0)
        else:
            lanes += tl.where(is_in, 1.0, 0.0)
    return tl.sum(lanes, 0)


@triton.jit
def _count_equal(values, size, value, after, TILE: tl.constexpr):
    """How many of `size` values equal `value`; `after` is the float after it."""
    found = _measure(values, size, value, 0.0, 0.0, False, TILE)
    return found - _measure(values, size, after, 0.0, 0.0, False, TILE)


@triton.jit
def _greatest(
    values, size, low, top, inv_temperature, target, BY_MASS: tl.constexpr, TILE: tl.constexpr
):
    """The greatest float from which on the values measure `target`; `low` if none above it does.

    Then the float after it, and what they measure from there on.
    """
    key, end = _key(low), _key(top) + 1
    above = target * 0.0
    while key + 1 < end:
        middle = (key & end) + ((key ^ end) >> 1)  # the mean, without overflow
        found = _measure(values, size, _value(middle), top, inv_temperature, BY_MASS, TILE)
        is_enough = found >= target
        key = tl.where(is_enough, middle, key)
        end = tl.where(is_enough, end, middle)
        above = tl.where(is_enough, above, found)
    return _value(key), _value(key + 1), above


@triton.jit
def _survey(logits, vocab_size, inv_temperature, is_counted, TILE: tl.constexpr):
    """The best logit; the weight of all; and of those above each cut [CUTS], or their number."""
    lane = tl.arange(0, TILE)
    tops = tl.full([TILE], -float("inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        mask = start + lane < vocab_size
        tops = tl.maximum(tops, tl.load(logits + start + lane, mask=mask, other=-float("inf")))
    top = _finite(tl.max(tops, 0))
    cut = -CUT_NATS * (tl.arange(0, NUM_CUTS) + 1)
    total = tl.zeros([TILE], tl.float32)
    above = tl.zeros([TILE, NUM_CUTS], tl.float32)
    for start in range(0, vocab_size, TILE):
        mask = start + lane < vocab_size
        x = tl.load(logits + start + lane, mask=mask, other=-float("inf"))
        z = (x - top) * inv_temperature
        weight = tl.exp(z)
        total += weight
        measure = tl.where(is_counted, 1.0, weight)
        above += tl.where(z[:, None] >= cut[None, :], measure[:, None], 0.0)
    return top, tl.sum(total, 0), tl.sum(above, 0)


@triton.jit
def _gather(
    logits, room, vocab_size, top, inv_temperature, lowest, min_p, SIZE, TILE: tl.constexpr
):
    """Copies the logits with z = (x - top) / T >= lowest and exp(z) >= min_p to `room`, in order,
    as far as SIZE goes. Returns how many there are and the least of them."""
    lane = tl.arange(0, TILE)
    found = vocab_size * 0
    least = tl.full([TILE], float("inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        mask = start + lane < vocab_size
        x = tl.load(logits + start + lane, mask=mask, other=-float("inf"))
        z = (x - top) * inv_temperature
        is_in = mask & (z >= lowest) & (tl.exp(z) >= min_p)
        place = found + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(room + place, x, mask=is_in & (place < SIZE))
        found += tl.sum(is_in.to(tl.int32), 0)
        least = tl.minimum(least, tl.where(is_in, x, float("inf")))
    tl.debug_barrier()  # other threads read what was stored
    return found, tl.min(least, 0)


@triton.jit
def _last_tie(logits, vocab_size, value, ties, TILE: tl.constexpr):
    """The id of the `ties`-th logit that equals `value`."""
    lane = tl.arange(0, TILE)
    before = vocab_size * 0
    last = vocab_size * 0
    for start in range(0, vocab_size, TILE):
        mask = start + lane < vocab_size
        x = tl.load(logits + start + lane, mask=mask, other=-float("inf"))
        is_tie = (mask & (x == value)).to(tl.int32)
        rank = before + tl.cumsum(is_tie, 0)
        is_kept = (is_tie > 0) & (rank <= ties)
        last = tl.maximum(last, tl.max(tl.where(is_kept, start + lane, 0), 0))
        before += tl.sum(is_tie, 0)
    return last


@launchable
@triton.jit
def threshold_kernel(
    logits_SV,
    batch_S2,
    params_RF,
    room_SN,
    thresholds_S2,
    vocab_size,
    row_stride,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """thresholds[i] = (bits of a float, id): greater logits stay, and of equal ones up to `id`.

    weight = exp((x - max x) / T). min_p: weights of at least min_p; then the top_k greatest; then
    the fewest greatest that weigh top_p of these. Equal ones: the lowest ids. One program a row:
    it finds a cut below which nothing can matter, gathers what lies above, and bisects on floats.
    """
    i = tl.program_id(0)
    params = params_RF + tl.load(batch_S2 + 2 * i) * FIELDS
    min_p, top_p = _real(params, MIN_P), _real(params, TOP_P)
    top_k = tl.load(params + TOP_K)
    inv_temperature = _real(params, INV_TEMPERATURE)
    if (min_p == 0) & (top_k == 0) & (top_p == 1):
        return
    logits = logits_SV + i.to(tl.int64) * row_stride
    top, total, measured = _survey(logits, vocab_size, inv_temperature, top_k > 0, TILE)
    cut = tl.arange(0, NUM_CUTS)
    is_enough = measured >= tl.where(top_k > 0, top_k.to(tl.float32), top_p * total)
    is_below = tl.exp(-CUT_NATS * (cut + 1)) < min_p
    is_enough = tl.where((min_p > 0) & (top_k == 0), is_below, is_enough)
    chosen = tl.min(tl.where(is_enough, cut, NUM_CUTS), 0)
    lowest = tl.where(chosen < NUM_CUTS, -CUT_NATS * (chosen + 1), -float("inf"))
    values = room_SN + i.to(tl.int64) * SIZE
    size, least = _gather(
        logits, values, vocab_size, top, inv_temperature, lowest, min_p, SIZE, TILE
    )
    num_left = size
    if size > SIZE:
        values = logits
        size = vocab_size
    after = _value(_key(least) + 1)
    above = vocab_size * 0.0
    ties = vocab_size
    if (top_k > 0) & (top_k < num_left):
        least, after, above = _greatest(
            values, size, least, top, inv_temperature, top_k, False, TILE
        )
        ties = top_k - above.to(tl.int32)
    if top_p < 1:
        if (top_k > 0) | (min_p > 0):
            equal = _count_equal(values, size, least, after, TILE)
            total = _measure(values, size, after, top, inv_temperature, True, TILE)
            weight = tl.exp((least - top) * inv_temperature)
            total += tl.minimum(ties.to(tl.float32), equal) * weight
        floor = least
        target = top_p * total
        least, after, above = _greatest(
            values, size, floor, top, inv_temperature, target, True, TILE
        )
        weight = tl.exp((least - top) * inv_temperature)
        needed = tl.ceil((target - above) / tl.maximum(weight, 1e-37))
        needed = tl.minimum(tl.maximum(needed, 1.0), vocab_size.to(tl.float32)).to(tl.int32)
        ties = tl.minimum(needed, tl.where(least == floor, ties, vocab_size))
    last = vocab_size
    if ties < _count_equal(values, size, least, after, TILE):
        last = _last_tie(logits, vocab_size, least, ties, TILE)
    tl.store(thresholds_S2 + 2 * i, least.to(tl.int32, bitcast=True))
    tl.store(thresholds_S2 + 2 * i + 1, last)


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
    score = _finite(top) * 0
    inv_temperature = _real(params, INV_TEMPERATURE)
    if inv_temperature > 0:
        z = (x - _finite(top)) * inv_temperature
        z += _gumbel(params, tl.load(batch_S2 + 2 * i + 1), chunk * CHUNK, CHUNK)
        top_k = tl.load(params + TOP_K)
        if (_real(params, MIN_P) > 0) | (top_k > 0) | (_real(params, TOP_P) < 1):
            least = _real(thresholds_S2, 2 * i)
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
    inv_temperature = _real(params, INV_TEMPERATURE)
    scale = tl.where(inv_temperature > 0, inv_temperature, 1.0)  # greedy scores are 0
    _, best = tl.max((tops - _finite(top)) * scale + scores, 0, return_indices=True)
    token = tl.sum(tl.where(chunk == best, ids, 0), 0)
    is_broken = (top == float("inf")) | (top == -float("inf")) | (token >= vocab_size)
    tl.store(token_ids_S + i, tl.where(is_broken, -1, token))
    tl.store(last_sampled_R + row, tl.where(is_broken, 0, token))
    slot = tl.load(params + SLOT).to(tl.int64)
    if (slot >= 0) & (is_broken == 0):
        at = counts + slot * vocab_size + token
        tl.store(at, tl.load(at) + 2)


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


def find_thresholds(logits_SV: Tensor, batch_S2: Tensor, params_RF: Tensor) -> Tensor:
    """Returns int32 [S, 2] for `choose`; left as they are for rows that keep all ids."""
    num_rows, vocab_size = logits_SV.shape
    thresholds = torch.empty_like(batch_S2)
    room = logits_SV.new_empty((num_rows, CANDIDATES))
    threshold_kernel[(num_rows,)](
        logits_SV,
        batch_S2,
        params_RF,
        room,
        thresholds,
        vocab_size,
        logits_SV.stride(0),
        SIZE=CANDIDATES,
        TILE=FILTER_TILE,
        num_warps=FILTER_WARPS,
    )
    return thresholds


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
