"""Decides for one step whether reading shared leading blocks once pays.

Called by the device runner. Knows block tables and lengths; the grouping itself is the kernel's
planner.
"""

from __future__ import annotations

import numpy as np

from octavo.kernels.triton.shared_prefix import (
    MIN_BLOCKS,
    SharedPrefixPlan,
    plan_shared_prefix,
)
from octavo.kernels.triton.splits import Tiling
from octavo.kv_cache.spec import KVGroup
from octavo.step import Int32

MIN_SAVED_BYTES = 1 << 30
"""Reads that a step must save (a third of a millisecond) to be worth the merging."""


def plan_prefix(
    group: KVGroup,
    block_table: Int32,
    seq_lens: Int32,
    query_lens: Int32,
    tiles: Tiling,
    *,
    block_size: int,
    min_saved_bytes: int,
    max_slots: int,
) -> SharedPrefixPlan | None:
    """Returns what single-query sequences share in one KV group, or None where it does not pay, or
    where the partial results of all rows were more than `max_slots`.

    block_table int32 [S, columns]; `tiles` is that of the group's layers. A window sees too little
    of a prefix to gain from it.
    """
    if group.spec.window is not None:
        return None
    is_long = (query_lens == 1) & (seq_lens >= MIN_BLOCKS * block_size)
    if np.count_nonzero(is_long) < 2:
        return None
    plan = plan_shared_prefix(block_table, seq_lens, query_lens, tiles, block_size=block_size)
    if plan is None or len(seq_lens) * plan.padded(len(seq_lens)).max_slots > max_slots:
        return None
    firsts = plan.members[plan.group_starts[:-1]]
    saved_tokens = int(plan.shared_tokens.sum() - plan.shared_tokens[firsts].sum())
    if saved_tokens * len(group.layers) * group.spec.token_bytes < min_saved_bytes:
        return None
    return plan
