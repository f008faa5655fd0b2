"""What kernels of single queries do alike, with keys a head or latent vectors: which row a program
has, which of its splits, and where their results go.

Device functions of attention/decode.py and latent/decode.py; they launch nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.tiles.softmax import with_sinks


@triton.jit
def row_of_program(query_starts, seq_lens, positions, token_sequences, BY_TOKEN: tl.constexpr):
    """Returns a token, its sequence, its visible length and its sequence's number of queries.
    Program 1 names a token (BY_TOKEN: then as if it were the only one) or a sequence."""
    if BY_TOKEN:
        t = tl.program_id(1).to(tl.int64)
        sequence = tl.load(token_sequences + t).to(tl.int64)
        length = tl.load(positions + t) + 1
        num_queries = t * 0 + 1
    else:
        sequence = tl.program_id(1).to(tl.int64)
        t = tl.load(query_starts + sequence).to(tl.int64)
        num_queries = tl.load(query_starts + sequence + 1) - t
        length = tl.load(seq_lens + sequence)
    return t, sequence, length, num_queries


@triton.jit
def _split_size(visible):
    """SPLIT_CLASSES on the device."""
    size = tl.where(visible <= 4096, 128, tl.where(visible <= 16384, 256, 512))
    return tl.where(visible <= 1024, 64, size)


@triton.jit
def splits_of(low, length, FIXED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns where the first split of [low, length) begins, their size and how many they are.
    FIXED: whatever the grid; else no more than there are programs."""
    size = _split_size(length - low)
    origin = low // size * size
    if not FIXED:
        origin = low // BLOCK_N * BLOCK_N
        even = tl.cdiv(length - origin, tl.num_programs(2))
        # Where rows fill the device alone, a short one is not worth a merge (32 of 96: 9.4 us by
        # four programs, 8.8 by three).
        size = tl.maximum(size, tl.where(tl.num_programs(2) < 8, 256, BLOCK_N))
        size = tl.maximum(size, tl.cdiv(even, BLOCK_N) * BLOCK_N)
    return origin, size, tl.cdiv(length - origin, size)


@triton.jit
def run_of_program(count):
    """Returns the splits [begin, stop) of a row of `count` that `program 2` attends, and how many
    programs have some (at least one); those beyond have none."""
    share = tl.maximum(tl.cdiv(count, tl.num_programs(2)), 1)
    num_busy = tl.maximum(tl.cdiv(count, share), 1)
    begin = tl.program_id(2) * share
    return begin, tl.minimum(begin + share, count), num_busy


@triton.jit
def store_split(
    mean, lse, is_only, out_at, row_mask, partial_out, partial_lse, places, is_head, sinks,
    D: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Stores what a split left, mean [M, BLOCK_D] and lse [M]: at out_at if it is its row's only
    one, with `sinks` [M] in the sum, else at `places` [M] of the partial results."""
    if is_only:
        if HAS_SINKS:
            mean = with_sinks(mean, lse, sinks, is_head)
        tl.store(out_at, mean.to(out_at.dtype.element_ty), mask=row_mask)
    else:
        offs_d = tl.arange(0, mean.shape[1])
        tl.store(partial_out + places[:, None] * D + offs_d[None, :], mean, mask=row_mask)
        tl.store(partial_lse + places, lse, mask=is_head)
