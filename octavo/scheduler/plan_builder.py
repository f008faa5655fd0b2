"""Collects one step's rows and turns them into a StepPlan. No decisions are made here."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as PySequence
from typing import NamedTuple

import numpy as np

from octavo.kv_cache.manager import KVCacheManager
from octavo.moments import Moment
from octavo.scheduler.rows import Rows
from octavo.scheduler.sequence import Sequence
from octavo.step import Bool, Int8, Int32, Purpose, RowStart, StepPlan


class PlanBuilder:
    """Filled by the scheduler while it walks its queues, then built once.

    Rows come in parts: many at once, as arrays, and between them single ones, which are kept in
    lists until the next part is begun."""

    def __init__(self, max_tokens: int, rows: Rows) -> None:
        self.max_tokens = max_tokens
        self.sequences: list[Sequence] = []
        self.num_tokens = 0
        self._all = rows
        self._prefill_starts: dict[Sequence, int] = {}
        """Sequences whose prompt is being computed in this very step, and from where."""
        self._parts: list[_Part] = []
        self._single = _Single()
        self._row_starts: list[RowStart] = []

    def start_row(self, sequence: Sequence) -> None:
        """The sequence takes its row in this step."""
        assert sequence.row is not None
        self._row_starts.append(
            RowStart(
                row=sequence.row,
                params=sequence.request.params,
                seed=sequence.seed,
                stop_token_ids=tuple(sorted(sequence.stop_ids)),
                prompt_len=sequence.prompt_len,
                token_ids=_known_ids(sequence),
                wants_vector=sequence.request.wants_vector,
            )
        )

    def add_rows(self, rows: Int32, counts: Int32) -> None:
        """Computes `counts` [rows] more tokens of running sequences, at least one of each, and
        advances their counters."""
        self._end_single()
        there = self._all
        starts, known, pending = there.computed[rows], there.known[rows], there.pending[rows]
        ends, from_device = starts + counts, starts >= known
        is_last = ends == known + pending
        purposes = (is_last & ~there.wants_vector[rows]).astype(np.int8)
        purposes[is_last & there.wants_vector[rows]] = Purpose.VECTOR
        there.computed[rows] = ends
        there.pending[rows] = pending + is_last
        ids = np.zeros(int(counts.sum()), np.int32)
        sequences: list[Sequence] = there.sequences[rows].tolist()
        if not from_device.all():
            at = np.cumsum(counts) - counts
            for place in np.flatnonzero(~from_device).tolist():
                sequence, start, end = sequences[place], int(starts[place]), int(ends[place])
                ids[at[place] : at[place] + end - start] = sequence.token_ids[start:end]
                self._note_prefill(sequence, start, end)
        self.sequences += sequences
        self.num_tokens += len(ids)
        masked = is_last & there.is_masked[rows]
        self._parts.append(_Part(rows, starts, counts, ids, from_device, purposes, masked))
        self._count(rows, counts)

    def _count(self, rows: Int32, counts: Int32) -> None:
        accounts = self._all.accounts[rows]
        first = accounts[0]
        if (accounts == first).all():
            first.computed += int(counts.sum())
            return
        for account, count in zip(accounts.tolist(), counts.tolist(), strict=True):
            account.computed += count

    def add(self, sequence: Sequence, count: int) -> None:
        """Computes `count` more tokens of one sequence and advances its counters."""
        start = sequence.num_computed
        end = start + count
        known = len(sequence.token_ids)
        assert sequence.row is not None
        single = self._single
        self.sequences.append(sequence)
        self.num_tokens += count
        single.rows.append(sequence.row)
        single.starts.append(start)
        single.counts.append(count)
        is_from_device = start >= known
        single.from_device.append(is_from_device)
        single.token_ids.extend((0,) if is_from_device else sequence.token_ids[start:end])
        self._note_prefill(sequence, start, end)
        sequence.num_computed = end
        sequence.account.computed += count
        is_last = end == known + sequence.num_pending
        purpose = Purpose.NONE
        if is_last:
            purpose = Purpose.VECTOR if sequence.request.wants_vector else Purpose.TOKEN
            sequence.num_pending += 1
        single.purposes.append(purpose)
        single.masked.append(is_last and sequence.is_masked)

    def _note_prefill(self, sequence: Sequence, start: int, end: int) -> None:
        is_prompt = start < sequence.prompt_len
        if is_prompt:
            self._prefill_starts[sequence] = start
        if sequence.moments is not None and (end - start > 1 or is_prompt):
            moment = Moment("prefill", time.monotonic(), first=start, count=end - start)
            sequence.moments.append(moment)

    def start_of(self, sequence: Sequence) -> int:
        """Returns how many tokens of a prompt are computed when this step begins; of one that is
        computed, its tokens."""
        return self._prefill_starts.get(sequence, sequence.num_computed)

    @property
    def room(self) -> int:
        """Tokens that the step may still take."""
        return max(0, self.max_tokens - self.num_tokens)

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    def _end_single(self) -> None:
        if self._single.rows:
            self._parts.append(self._single.part())
            self._single = _Single()

    def build(self, step_id: int, freed_rows: tuple[int, ...], manager: KVCacheManager) -> StepPlan:
        """Returns the plan; nothing may be added any more."""
        self._end_single()
        whole = _joined(self._parts)
        return StepPlan(
            step_id=step_id,
            rows=whole.rows,
            starts=whole.starts,
            query_lens=whole.counts,
            token_ids=whole.token_ids,
            from_device=whole.from_device,
            purposes=whole.purposes,
            masked=whole.masked if whole.masked.any() else None,
            row_starts=tuple(self._row_starts),
            freed_rows=freed_rows,
            freed_pages=manager.take_emptied(),
            copies=manager.take_copies(),
            saves=manager.take_saves(),
            table_deltas=manager.take_deltas(),
        )

    def spans(self) -> Iterator[tuple[Sequence, int, int]]:
        """Yields each sequence with the first token that the step computes of it, and the end."""
        self._end_single()
        whole = _joined(self._parts)
        ends = whole.starts + whole.counts
        yield from zip(self.sequences, whole.starts.tolist(), ends.tolist(), strict=True)


def _known_ids(sequence: Sequence) -> Int32:
    """Returns its prompt, then its outputs so far; of one that begins without a copy."""
    if sequence.num_outputs:
        return np.array(sequence.token_ids, np.int32)
    return np.frombuffer(sequence.request.packed_prompt, np.int32)


class _Part(NamedTuple):
    """Arrays of a plan."""

    rows: Int32
    starts: Int32
    counts: Int32
    token_ids: Int32
    from_device: Bool
    purposes: Int8
    masked: Bool


def _joined(parts: PySequence[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    return _Part(*map(np.concatenate, zip(*parts, strict=True)))


class _Single:
    """Rows that were added one by one."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.token_ids = array("i")
        self.from_device: list[bool] = []
        self.purposes: list[Purpose] = []
        self.masked: list[bool] = []

    def part(self) -> _Part:
        """Returns them as arrays."""
        return _Part(
            np.array(self.rows, np.int32),
            np.array(self.starts, np.int32),
            np.array(self.counts, np.int32),
            np.array(self.token_ids, np.int32),
            np.array(self.from_device, np.bool_),
            np.array(self.purposes, np.int8),
            np.array(self.masked, np.bool_),
        )
