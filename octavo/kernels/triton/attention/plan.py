"""The plan of a step's attention: where decodes leave partial results, what rows share, bounds.

Made by the Triton back end (`octavo.kernels.planning`), read by choose.py, decode.py and shared.py
through the `DevicePlan` of each KV group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor

from octavo.kernels.facts import split_partials
from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import PlanLimits, PlannedGroup, StepRows
from octavo.kernels.triton.attention.choose import SHORT_QUERIES
from octavo.kernels.triton.attention.device_plan import DevicePlan, LongRow
from octavo.kernels.triton.attention.partials import max_total_partials, partial_counts
from octavo.kernels.triton.attention.prompts import SharedPromptsPlan, plan_prompts
from octavo.kernels.triton.attention.shared import MIN_BLOCKS, SharedPrefixPlan, plan_shared_prefix
from octavo.kernels.triton.attention.splits import Tiling, latent_tiling, tiling
from octavo.step import Int32
from octavo.visibility import Full

MIN_SAVED_BYTES = 1 << 30
"""Reads that a step must save (a third of a millisecond) to be worth the merging."""
_UNBOUNDED = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """See `octavo.kernels.planning.StepAttention`."""

    partial_starts: Int32
    """[S + 1] prefix sums of `partial_counts`; rows without a single query have none."""
    prefixes: tuple[SharedPrefixPlan | None, ...]
    """By KV group."""
    limits: PlanLimits
    max_query_len: int
    max_seq_len: int | None
    num_short_tokens: int
    """Rows of few queries, but more than one, lie among the first so many tokens."""
    num_few_tokens: int
    """Rows of one query and those of few lie among the first so many tokens."""
    num_long_keys: int | None
    """What rows of more queries see together, but for what groups of `prompts` share."""
    long_rows: tuple[LongRow, ...] | None
    """The rows of more queries; None where a step is padded."""
    max_partials: int
    prompts: SharedPromptsPlan | None = None
    """Of the one KV group, whose layers have latent vectors."""

    @property
    def arrays(self) -> Sequence[Int32]:
        shared = (prefix.arrays for prefix in self.prefixes if prefix is not None)
        prompts = () if self.prompts is None else self.prompts.arrays
        return [self.partial_starts, *(array for arrays in shared for array in arrays), *prompts]

    @property
    def bounds(self) -> Hashable:
        if not any(self.prefixes):
            return None
        return tuple(prefix and prefix.bounds for prefix in self.prefixes)

    def padded(self, num_rows: int, num_tokens: int) -> StepPlan | None:
        if self.prompts is not None:
            return None
        limits, is_decode = self.limits, self.max_query_len == 1
        prefixes = tuple(prefix and prefix.padded(num_rows) for prefix in self.prefixes)
        max_partials = max_total_partials(num_rows, limits.max_model_len, limits.kv_tokens)
        if all(prefixes):
            max_partials = _UNBOUNDED  # the shared path keeps its own room
        live = len(self.partial_starts) - 1
        starts = np.zeros(num_rows + 1, np.int32)
        starts[: live + 1] = self.partial_starts
        starts[live:] = starts[live] + np.arange(num_rows - live + 1)
        if starts[-1] > max_partials:
            return None
        return StepPlan(
            partial_starts=starts,
            prefixes=prefixes,
            limits=limits,
            max_query_len=1 if is_decode else num_tokens,
            max_seq_len=None,
            num_short_tokens=0 if is_decode else num_tokens,
            num_few_tokens=num_tokens,
            num_long_keys=None,
            long_rows=None,
            max_partials=max_partials,
        )

    def on_device(
        self, batches: Sequence[AttentionBatch], tensors: Sequence[Tensor]
    ) -> tuple[AttentionBatch, ...]:
        partial_starts, *rest = tensors
        left = iter(rest)
        return tuple(
            replace(
                batch,
                plan=DevicePlan(
                    max_query_len=self.max_query_len,
                    max_seq_len=self.max_seq_len,
                    num_short_tokens=self.num_short_tokens,
                    num_few_tokens=self.num_few_tokens,
                    num_long_keys=self.num_long_keys,
                    long_rows=self.long_rows,
                    partial_starts_S=partial_starts,
                    max_partials=self.max_partials,
                    prefix=prefix and prefix.on_device(list(islice(left, 6))),
                    prompts=self.prompts and self.prompts.on_device(list(islice(left, 4))),
                ),
            )
            for batch, prefix in zip(batches, self.prefixes, strict=True)
        )


class StepPlanner:
    """Plans of all KV groups, step after step.

    Blocks are shared from a row's start on, and those that it adds are its own: while the same rows
    go on, they share what they shared, and no block is looked at.
    """

    def __init__(
        self,
        groups: Sequence[PlannedGroup],
        limits: PlanLimits,
        processors: int,
        *,
        min_saved_bytes: int | None = MIN_SAVED_BYTES,
    ) -> None:
        """`min_saved_bytes`: reads that sharing prefixes must save in a step to be used; None:
        never, so that no bit depends on who else is in the batch."""
        self._groups = groups
        self._limits = limits
        self._tilings = [_tiling(one, processors) for one in groups]
        self._min_saved_bytes = min_saved_bytes
        self._max_partials = limits.max_num_seqs * split_partials(limits.max_model_len)
        self._known: list[SharedPrefixPlan | None] = []
        self._known_for: tuple[int, bytes, bytes] | None = None

    def plan(self, rows: StepRows) -> StepPlan:
        query_lens = rows.query_lens
        # Windows leave fewer partial results than no window.
        counts = np.where(query_lens == 1, partial_counts(rows.seq_lens, None), 0)
        partial_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        prompts = self._prompts(rows)
        is_few = query_lens <= (SHORT_QUERIES if prompts is None else 1)
        return StepPlan(
            partial_starts=partial_starts,
            prefixes=tuple(self.prefixes(rows)),
            limits=self._limits,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(rows.seq_lens.max()),
            num_short_tokens=_end_of_last(is_few & (query_lens > 1), rows),
            num_few_tokens=_end_of_last(is_few, rows),
            num_long_keys=_num_long_keys(rows, ~is_few, prompts),
            long_rows=_long_rows(rows, ~is_few),
            max_partials=int(partial_starts[-1]),
            prompts=prompts,
        )

    def _prompts(self, rows: StepRows) -> SharedPromptsPlan | None:
        if len(self._groups) > 1 or self._min_saved_bytes is None:
            return None
        return plan_prompts(self._groups[0], rows, rows.tables[0])

    def prefixes(self, rows: StepRows) -> list[SharedPrefixPlan | None]:
        """Returns what the rows share, by KV group, or None where partial results of all rows were
        too many; over latent vectors there is room for them (`most_lone_partials`)."""
        if self._min_saved_bytes is None:
            return [None] * len(self._groups)
        key = rows.num_started, rows.rows.tobytes(), (rows.query_lens == 1).tobytes()
        if key != self._known_for:
            self._known_for = key
            self._known = [
                plan_prefix(group, rows, table, tiles, self._min_saved_bytes)
                for group, table, tiles in zip(
                    self._groups, rows.tables, self._tilings, strict=True
                )
            ]
        grown = [known and known.grown(rows.seq_lens, rows.query_lens) for known in self._known]
        most = self._max_partials // len(rows.rows)
        fits = (
            plan is not None and (group.is_latent or plan.max_partials <= most)
            for group, plan in zip(self._groups, grown, strict=True)
        )
        return [plan if fit else None for plan, fit in zip(grown, fits, strict=True)]


def _end_of_last(is_some: np.ndarray, rows: StepRows) -> int:
    """Returns where the tokens of the last of some rows end; 0 if there is none."""
    some = np.flatnonzero(is_some)
    return int(rows.query_starts[some[-1] + 1]) if len(some) else 0


def _long_rows(rows: StepRows, is_long: np.ndarray) -> tuple[LongRow, ...]:
    index = np.flatnonzero(is_long)
    starts, ends = rows.query_starts[index], rows.query_starts[index + 1]
    found = zip(*(x.tolist() for x in (index, starts, ends, rows.seq_lens[index])), strict=True)
    return tuple(
        LongRow(index=at, first_token=first, end_token=end, seq_len=length)
        for at, first, end, length in found
    )


def _num_long_keys(rows: StepRows, is_long: np.ndarray, prompts: SharedPromptsPlan | None) -> int:
    """Returns what rows of many queries see together, each by itself."""
    own = rows.seq_lens if prompts is None else rows.seq_lens - prompts.low
    return int(own[is_long].sum())


def _tiling(group: PlannedGroup, processors: int) -> Tiling:
    if group.is_latent:
        return latent_tiling(group.num_heads, processors)
    return tiling(group.num_heads, group.num_kv_heads, processors)


def plan_prefix(
    group: PlannedGroup, rows: StepRows, table: Int32, tiles: Tiling, min_saved_bytes: int
) -> SharedPrefixPlan | None:
    """Returns what single-query sequences share in one KV group, or None where it does not pay.

    `table` is that of all persistent rows, `tiles` that of the group's layers. A window or a chunk
    sees too little of a prefix to gain from it.
    """
    if not isinstance(group.visibility, Full):
        return None
    block_size = group.block_size
    is_long = (rows.query_lens == 1) & (rows.seq_lens >= MIN_BLOCKS * block_size)
    if np.count_nonzero(is_long) < 2:
        return None
    columns = -(-int(rows.seq_lens.max()) // block_size)
    plan = plan_shared_prefix(
        table[rows.rows, :columns], rows.seq_lens, rows.query_lens, tiles, block_size=block_size
    )
    if plan is None:
        return None
    firsts = plan.members[plan.group_starts[:-1]]
    saved_tokens = int(plan.shared_tokens.sum() - plan.shared_tokens[firsts].sum())
    return plan if saved_tokens * group.token_bytes >= min_saved_bytes else None
