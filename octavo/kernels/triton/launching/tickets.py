"""Which program of a launch is the last to end, and so may go on with what all of them stored.

Used by kernels that would else need a second launch. Never decides in which order sums are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_TICKETS = 1 << 16


def make_tickets(device: torch.device) -> Tensor:
    """Returns counters that are zero between launches. One stream's kernels can share them, since
    each waits for the one before it."""
    return torch.zeros(NUM_TICKETS, dtype=torch.int32, device=device)


def room_for_splits(
    like: Tensor,
    splits: int,
    sizes: Sequence[int],
    tiles: int,
    tickets: Tensor | None,
    *,
    is_always: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns where `splits` programs of each of some tiles leave their parts of a sum, float32
    [splits, *sizes], and tickets for the tiles, made if there are none; anything if splits is 1,
    unless `is_always`."""
    if splits == 1 and not is_always:
        return like, like
    if tickets is None:
        tickets = make_tickets(like.device)
    assert tiles <= len(tickets), (tiles, len(tickets))
    return like.new_empty((splits, *sizes), dtype=torch.float32), tickets


@triton.jit
def is_last(ticket, count):
    """Whether the other `count` - 1 programs have been here: what they stored before can be loaded.

    Loads must pass the L1 cache by (".cg"), which may hold what lay there before.
    """
    tl.debug_barrier()  # All threads have stored before one of them releases it.
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(ticket, 0)
    return is_last
