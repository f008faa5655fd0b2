"""A sum of many rows over ranks, chunk by chunk through the other ranks' memory; with the norm that
comes next, if that is wanted.

Called by `sums.py`. A program sends chunks of rows ahead, each followed by a flag, and adds up the
chunks whose flags have come: the wires are busy while the memory is. All programs of a launch are
there at once, so that none waits for one that cannot start. Two places in turn, as in `rows.py`;
flags count, and are never put back.

With two ranks each sends its rows once: no more than if each summed half of them and sent that.

Shape legend: T rows, M columns, R ranks, C chunks of ROWS rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import wait_turn
from octavo.kernels.triton.peers.rows import POLLS, normed_of, part_of_row


@triton.jit
def await_flag(flag, wanted, stop, limit):
    """Returns when the flag has counted to `wanted`, and what was stored before that can be seen.
    Gives up as `rows.arrived` does."""
    behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - wanted
    tries = 0
    while (behind < 0) & (tries < limit):
        behind = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - wanted
        tries += 1
        if tries % POLLS == 0:  # noqa: SIM102 Triton would load both sides of an `and`
            if tl.load(stop, volatile=True) != 0:
                tries = limit
    if behind < 0:
        tl.store(stop, 1)
    tl.debug_barrier()  # The others of the program see what the one that looked has seen.


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def sum_chunks_kernel(
    stop,
    x_TM,
    residual_TM,
    weight_M,
    out_TM,
    flags,
    places,
    turns_C,
    num_rows,
    num_columns,
    x_stride,
    residual_stride,
    eps,
    max_rows,
    limit,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As `rows.sum_row_kernel`; parts of x are added up in place, in its first part.

    places: a tensor of numbers a rank, [2, R - 1, max_rows, M]; flags: one of int32 [R - 1,
    max_rows / ROWS]. Those of RANK are here: what the other ranks send, in rank order. turns [C]
    counts the sums of a chunk. AHEAD: how many chunks a program sends before it waits for one.
    """
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < num_columns
    weight = tl.zeros([1, BLOCK], tl.float32)
    if NORM:
        weight = tl.load(weight_M + column, mask=is_column, other=0.0).to(tl.float32)
    wait_turn(OVERLAP)
    num_chunks = tl.cdiv(num_rows, ROWS)
    max_chunks = max_rows // ROWS
    step = tl.num_programs(0)
    for index in range(tl.program_id(0), num_chunks + AHEAD * step, step):
        if index < num_chunks:
            turn = tl.load(turns_C + index, volatile=True)
            row = index * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
            is_in = (row < num_rows) & is_column
            x_at = x_TM + row * x_stride + column
            part = part_of_row(x_at, is_in, num_columns, PARTS)
            if PARTS > 1:
                tl.store(x_at, part, mask=is_in)
            place = (turn & 1).to(tl.int64) * (SIZE - 1)
            for target in tl.static_range(SIZE):
                if target != RANK:
                    mine = place + (RANK if target > RANK else RANK - 1)
                    at = places[target] + (mine * max_rows + row) * num_columns + column
                    tl.store(at, part, mask=is_in)
            tl.debug_barrier()  # All threads have stored before one of them says so.
            for target in tl.static_range(SIZE):
                if target != RANK:
                    mine = RANK if target > RANK else RANK - 1
                    flag = flags[target] + mine * max_chunks + index
                    tl.atomic_xchg(flag, turn + 1, sem="release", scope="sys")
        chunk = index - AHEAD * step
        if chunk >= 0:
            turn = tl.load(turns_C + chunk, volatile=True)
            row = chunk * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
            is_in = (row < num_rows) & is_column
            place = (turn & 1).to(tl.int64) * (SIZE - 1)
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            for source in tl.static_range(SIZE):
                at = x_TM + row * x_stride + column
                if source != RANK:
                    theirs = source if source < RANK else source - 1
                    await_flag(flags[RANK] + theirs * max_chunks + chunk, turn + 1, stop, limit)
                    at = places[RANK] + ((place + theirs) * max_rows + row) * num_columns + column
                # Past the L1 cache, which knows nothing of what other ranks store.
                found = tl.load(at, mask=is_in, other=0.0, cache_modifier=".cg")
                total += found.to(tl.float32)
            total = total.to(x_TM.dtype.element_ty).to(tl.float32)
            if NORM:
                at = residual_TM + row * residual_stride + column
                total = normed_of(total, at, is_in, weight, num_columns, eps)
            out_at = out_TM + row * num_columns + column
            tl.store(out_at, total.to(out_TM.dtype.element_ty), mask=is_in)
            tl.store(turns_C + chunk, turn + 1)
