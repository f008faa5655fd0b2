"""The plan of chunks over latent vectors whose keys and values are multiplied out, once for all
that share them.

Made by plan.py once a step, where it saves enough; carried out by latent/expand.py. Members of a
group that lie side by side in the batch attend what they share as if they were one sequence, since
all of them see all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from octavo.kernels.planning import PlannedGroup, StepRows
from octavo.kernels.triton.attention.choose import SHORT_QUERIES
from octavo.kernels.triton.attention.device_plan import SharedPrompts
from octavo.kernels.triton.attention.groups import shared_groups
from octavo.step import MAX_PADDED_TOKENS, Int32

MIN_SAVED_PAIRS = 1 << 25
"""Of queries of a head with a key: what a layer must save to be worth launching a step kernel by
kernel. An H100 takes about 0.1 ms for them."""
MIN_SHARED_BLOCKS = 16
"""Fewer are not worth a pass of their own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPromptsPlan:
    """See `SharedPrompts`; on the host."""

    low: Int32
    leaders: Int32
    run_starts: Int32
    run_groups: Int32

    @property
    def arrays(self) -> tuple[Int32, ...]:
        """What a device needs of it, in the order that `on_device` takes."""
        return self.low, self.leaders, self.run_starts, self.run_groups

    def on_device(self, tensors: Sequence[Tensor]) -> SharedPrompts:
        """Returns the plan over the tensors that `arrays` have become."""
        low_S, leaders_G, run_starts, run_groups_R = tensors
        return SharedPrompts(
            low_S=low_S,
            leaders_G=leaders_G,
            run_starts=run_starts,
            run_groups_R=run_groups_R,
            shared_tokens=tuple(self.low[self.leaders].tolist()),
        )


def plan_prompts(group: PlannedGroup, rows: StepRows, table: Int32) -> SharedPromptsPlan | None:
    """Returns how the chunks of a step are multiplied out, or None where the usual way costs less.

    `table` is that of all persistent rows. Only what was computed before the step is shared.
    """
    query_lens, seq_lens = rows.query_lens, rows.seq_lens
    chunks = query_lens > 1
    expanding = group.expanding_queries
    if not expanding or not chunks.any():
        return None
    # In 64 bits: a step may have more pairs than 2^31.
    pairs = np.where(chunks, query_lens * (seq_lens - query_lens // 2).astype(np.int64), 0)
    usual = pairs
    if query_lens.sum() > MAX_PADDED_TOKENS:
        usual = np.where(query_lens > SHORT_QUERIES, expanding * seq_lens.astype(np.int64), pairs)
    least = -(-MIN_SAVED_PAIRS // group.num_heads)
    # There are at least as many keys as the longest sees.
    if usual.sum() - expanding * int(seq_lens[chunks].max()) < least:
        return None
    low, groups = _shared(rows, table[rows.rows], group.block_size)
    leaders = np.array([members[0] for members in groups], np.int32)
    num_keys = int(low[leaders].sum()) + int((seq_lens - low)[chunks].sum())
    if usual.sum() - expanding * num_keys < least:
        return None
    run_starts, run_groups = _runs(groups, rows)
    return SharedPromptsPlan(low=low, leaders=leaders, run_starts=run_starts, run_groups=run_groups)


def _shared(rows: StepRows, table: Int32, block_size: int) -> tuple[Int32, list[list[int]]]:
    """Returns the tokens of each sequence that a group attends for it, and the groups' members."""
    before = np.where(rows.query_lens > 1, rows.seq_lens - rows.query_lens, 0)
    low = np.zeros(len(before), np.int32)
    groups: list[list[int]] = []
    for members, blocks in shared_groups(table, before // block_size, MIN_SHARED_BLOCKS):
        low[members] = blocks * block_size
        groups.append(sorted(members))
    return low, groups


def _runs(groups: list[list[int]], rows: StepRows) -> tuple[Int32, Int32]:
    """Returns where runs of sequences of one group begin, in tokens, and the group of each: -1 of
    those that are in none."""
    group_of = np.full(len(rows.rows), -1, np.int32)
    for index, members in enumerate(groups):
        group_of[members] = index
    firsts = np.flatnonzero(np.diff(group_of, prepend=-2))
    starts = np.append(rows.query_starts[firsts], rows.query_starts[-1])
    return starts.astype(np.int32), group_of[firsts]
