"""A sum of rows over ranks, each row pushed into the other ranks' memory; with the norm that comes
next, if that is wanted.

Called by `sums.py`. Every word that is sent says by itself that it is there: where none has come
lies EMPTY, the bits of -0.0, which is sent as 0.0. So no flag follows the data, nothing is fenced,
and nobody waits for the data to have arrived before it says so. The reader puts EMPTY back. A row
takes two places in turn: a rank sends the sum after the next only when it has this one's successor
from every other rank, which those sent when they had read and emptied this one.

A program has a row: it sends, and then waits. Programs start in order on every rank, so that of the
rows that some rank still waits for the first has been sent, however many are there at once.

Shape legend: T rows, M columns, R ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, wait_turn

POLLS = tl.constexpr(1 << 10)
"""Tries between two looks at whether others have given up."""
LOOKS = tl.constexpr(1 << 16)
"""Tries, some 40 ms, between two looks at what the host says. Its memory is far: all programs that
look at once take longer than a short wait, the other rank then waits as long and looks too, and
both went on so, sum after sum."""


@triton.jit
def part_of_row(x_at, ids_at, is_in, num_columns, PARTS: tl.constexpr, TOP_K: tl.constexpr):
    """Returns a row [BLOCK] in x's format: what lies at `x_at`, or PARTS rows there, added up in
    order and rounded; of the first TOP_K those whose id at `ids_at` is not negative."""
    if (PARTS == 1) & (TOP_K == 0):
        return tl.load(x_at, mask=is_in, other=0.0)
    total = tl.zeros(x_at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        is_here = is_in
        if part < TOP_K:
            is_here = is_in & (tl.load(ids_at + part) >= 0)
        one = tl.load(x_at + part * num_columns, mask=is_here, other=0.0)
        total += one.to(tl.float32)
    return total.to(x_at.dtype.element_ty)


@triton.jit
def send_row(
    part,
    words,
    turn,
    row,
    column,
    max_rows,
    num_columns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """Writes a row [BLOCK] into every other rank's memory; returns what was sent."""
    is_in = column < num_columns
    sent = part.to(words[RANK].dtype.element_ty, bitcast=True)
    sent = tl.where(sent == EMPTY, tl.zeros_like(sent), sent)
    place = (turn & 1).to(tl.int64) * (SIZE - 1)
    for target in tl.static_range(SIZE):
        if target != RANK:
            mine = place + (RANK if target > RANK else RANK - 1)
            at = words[target] + (mine * max_rows + row) * num_columns + column
            tl.store(at, sent, mask=is_in)
    return sent


@triton.jit
def normed_of(total, residual, residual_at, is_in, weight, num_columns, eps):
    """Stores residual + total, rounded; returns the RMS norm of that, float32."""
    y = total + residual.to(tl.float32)
    rounded = y.to(residual_at.dtype.element_ty)
    tl.store(residual_at, rounded, mask=is_in)
    exact = rounded.to(tl.float32)
    axis: tl.constexpr = len(exact.shape) - 1
    mean = tl.sum(exact * exact, axis, keep_dims=True) / num_columns
    return exact * tl.rsqrt(mean + eps) * weight


@triton.jit
def is_over(tries, stop, given_up):
    """Whether nobody is to wait any longer: a program has given up, or stop[0] is not 0."""
    found = tries < 0
    if tries % POLLS == 0:
        found = tl.load(given_up, volatile=True) != 0
        if tries % LOOKS == 0:  # noqa: SIM102 Triton would load both sides of an `and`
            if tl.load(stop, volatile=True) != 0:
                tl.store(given_up, 1)
                found = tries >= 0
    return found


@triton.jit
def await_word(word, stop, given_up, limit, EMPTY: tl.constexpr):
    """Returns when the word is not EMPTY; gives up as `arrived` does, and leaves that to it."""
    tries = 0
    found = tl.load(word, volatile=True)
    while (found == EMPTY) & (tries < limit):
        found = tl.load(word, volatile=True)
        tries += 1
        if is_over(tries, stop, given_up):
            tries = limit


@triton.jit
def arrived(words_at, is_in, stop, given_up, limit, EMPTY: tl.constexpr):
    """Returns the words when none of them is EMPTY, and leaves EMPTY in their place. Gives up after
    `limit` tries, or when it `is_over`; says so then."""
    words = tl.load(words_at, mask=is_in, other=0, volatile=True)
    missing = tl.max((words == EMPTY).to(tl.int32), 0)
    tries = 0
    while (missing > 0) & (tries < limit):
        words = tl.load(words_at, mask=is_in, other=0, volatile=True)
        missing = tl.max((words == EMPTY).to(tl.int32), 0)
        tries += 1
        if is_over(tries, stop, given_up):
            tries = limit
    if missing > 0:
        tl.store(stop, 1)
        tl.store(given_up, 1)
    tl.store(words_at, tl.full(words.shape, EMPTY, words.dtype), mask=is_in)
    return words


@launchable
@triton.jit
def sum_row_kernel(
    stop,
    x_TM,
    ids_TK,
    residual_TM,
    weight_M,
    out_TM,
    words,
    turns_T,
    num_columns,
    x_stride,
    residual_stride,
    eps,
    max_rows,
    limit,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = the sum of x over ranks, in rank order, rounded; with NORM residual += that in place
    and out = its RMS norm.

    x [T, M], or parts [T, PARTS, M], of the first TOP_K those whose ids [T, TOP_K] are not
    negative; residual, out [T, M]; rows of x and residual strided. words: a tensor of integers a
    rank, [2, R - 1, max_rows, M], of which words[RANK] is here: what the other ranks send, in rank
    order. turns [max_rows + 1] counts the sums of a row; the last one is not 0 when a program has
    given up waiting. GATED: looks at a row's last word alone until it is there; else at all of
    them, which is sooner by a look, but where many programs wait keeps the memory from those that
    write.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_in = column < num_columns
    weight = tl.zeros([BLOCK], tl.float32)
    if NORM:
        weight = tl.load(weight_M + column, mask=is_in, other=0.0).to(tl.float32)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    turn = tl.load(turns_T + row, volatile=True)
    given_up = turns_T + max_rows
    x_at, ids_at = x_TM + row * x_stride + column, ids_TK + row * TOP_K
    part = part_of_row(x_at, ids_at, is_in, num_columns, PARTS, TOP_K)
    sent = send_row(part, words, turn, row, column, max_rows, num_columns, RANK, SIZE, EMPTY)
    residual_at = residual_TM + row * residual_stride + column
    residual = part
    if NORM:
        residual = tl.load(residual_at, mask=is_in, other=0.0)
    place = (turn & 1).to(tl.int64) * (SIZE - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(SIZE):
        found = sent
        if source != RANK:
            theirs = place + (source if source < RANK else source - 1)
            first = words[RANK] + (theirs * max_rows + row) * num_columns
            at = first + column
            if GATED:
                await_word(first + num_columns - 1, stop, given_up, limit, EMPTY)
            found = arrived(at, is_in, stop, given_up, limit, EMPTY)
        total += found.to(part.dtype, bitcast=True).to(tl.float32)
    total = total.to(part.dtype).to(tl.float32)
    if NORM:
        total = normed_of(total, residual, residual_at, is_in, weight, num_columns, eps)
    tl.store(out_TM + row * num_columns + column, total.to(out_TM.dtype.element_ty), mask=is_in)
    tl.store(turns_T + row, turn + 1)
