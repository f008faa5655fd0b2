"""What top_k, top_p and min_p leave of a row: its least kept logit, and which of equal ones.

Called by `octavo.runner.device_sampler` after the penalties.

Shape legend: S sampled rows, R persistent rows, F fields, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.sampling.params import (
    FIELDS,
    INV_TEMPERATURE,
    MIN_P,
    TOP_K,
    TOP_P,
    finite,
    real,
)

FILTER_TILE = 4096
FILTER_WARPS = 16
CANDIDATES = 8192
"""Logits that the search for thresholds copies together; with more it walks the whole row."""
NUM_CUTS = tl.constexpr(8)
CUT_NATS = tl.constexpr(2.0)
"""Candidates are looked for 2, 4, ... 16 nats below the best."""


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
    top = finite(tl.max(tops, 0))
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
    min_p, top_p = real(params, MIN_P), real(params, TOP_P)
    top_k = tl.load(params + TOP_K)
    inv_temperature = real(params, INV_TEMPERATURE)
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
