"""Decides for one step whether reading shared leading blocks once pays.

Called by the device runner. Knows block tables and lengths; the grouping itself is the kernel's
planner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.kernels.triton.attention.shared import MIN_BLOCKS, SharedPrefixPlan, plan_shared_prefix
from octavo.kernels.triton.attention.splits import Tiling
from octavo.kv_cache.spec import KVGroup
from octavo.step import Int32
from octavo.visibility import Full

MIN_SAVED_BYTES = 1 << 30
"""Reads that a step must save (a third of a millisecond) to be worth the merging."""


class PrefixPlanner:
    """Plans of all KV groups, step after step.

    Blocks are shared from a row's start on, and those that it adds are its own: while the same rows
    go on, they share what they shared, and no block is looked at.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        tilings: Sequence[Tiling],
        *,
        block_size: int,
        min_saved_bytes: int | None,
        max_slots: int,
    ) -> None:
        """`tilings`: those of the groups' layers. `min_saved_bytes` None: nothing is ever
        planned."""
        self._groups = groups
        self._tilings = tilings
        self._block_size = block_size
        self._min_saved_bytes = min_saved_bytes
        self._max_slots = max_slots
        self._known: list[SharedPrefixPlan | None] = []
        self._known_for: tuple[bytes, bytes] | None = None

    def forget(self) -> None:
        """A row has started: it may share with any other."""
        self._known_for = None

    def plan(
        self, tables: Int32, rows: Int32, seq_lens: Int32, query_lens: Int32
    ) -> list[SharedPrefixPlan | None]:
        """Returns what `rows` of the block tables [groups, max_rows, columns] share, by KV group,
        or None where partial results of all rows were too many."""
        if self._min_saved_bytes is None:
            return [None] * len(self._groups)
        key = rows.tobytes(), (query_lens == 1).tobytes()
        if key != self._known_for:
            self._known_for = key
            columns = -(-int(seq_lens.max()) // self._block_size)
            self._known = [
                plan_prefix(
                    group,
                    table[rows, :columns],
                    seq_lens,
                    query_lens,
                    tiles,
                    block_size=self._block_size,
                    min_saved_bytes=self._min_saved_bytes,
                )
                for group, table, tiles in zip(self._groups, tables, self._tilings, strict=True)
            ]
        grown = [known and known.grown(seq_lens, query_lens) for known in self._known]
        most = self._max_slots // len(rows)
        return [plan if plan and plan.max_slots <= most else None for plan in grown]


def plan_prefix(
    group: KVGroup,
    block_table: Int32,
    seq_lens: Int32,
    query_lens: Int32,
    tiles: Tiling,
    *,
    block_size: int,
    min_saved_bytes: int,
) -> SharedPrefixPlan | None:
    """Returns what single-query sequences share in one KV group, or None where it does not pay.

    block_table int32 [S, columns]; `tiles` is that of the group's layers. A window sees too little
    of a prefix to gain from it, and so does a chunk.
    """
    if group.spec.visibility != Full():
        return None
    is_long = (query_lens == 1) & (seq_lens >= MIN_BLOCKS * block_size)
    if np.count_nonzero(is_long) < 2:
        return None
    plan = plan_shared_prefix(block_table, seq_lens, query_lens, tiles, block_size=block_size)
    if plan is None:
        return None
    firsts = plan.members[plan.group_starts[:-1]]
    saved_tokens = int(plan.shared_tokens.sum() - plan.shared_tokens[firsts].sum())
    if saved_tokens * len(group.layers) * group.spec.token_bytes < min_saved_bytes:
        return None
    return plan
