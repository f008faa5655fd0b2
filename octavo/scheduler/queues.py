"""Owns who waits and who runs, and the rows of those that run. Pure Python.

Shared by the parts of the scheduler: admission moves sequences from waiting to running, preemption
back again, and outcomes end them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence as PySequence
from heapq import merge

import numpy as np

from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.recent_prompts import RecentPrompt, RecentPrompts
from octavo.moments import Moment
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.fair_share import FairShare, arrival
from octavo.scheduler.rows import Rows
from octavo.scheduler.sequence import Sequence
from octavo.scheduler.suspects import Suspects
from octavo.step import Int32


def prompt_of(sequence: Sequence) -> RecentPrompt:
    """Returns what is remembered of a sequence: its tokens, and its published blocks."""
    kv, request = sequence.kv, sequence.request
    return RecentPrompt(request.tenant, kv.root, sequence.token_ids, kv.digests, kv.num_published)


class Queues:
    """Who waits is kept by tenant, who runs in order of priority and arrival."""

    def __init__(
        self, manager: KVCacheManager, counters: SchedulerCounters, max_num_seqs: int
    ) -> None:
        self.fair_share = FairShare()
        self.num_waiting = 0
        self.running: list[Sequence] = []
        self.rows = Rows(max_num_seqs)
        self._running_rows = np.zeros(max_num_seqs, np.int32)
        """Parallel to `running`, then anything."""
        self.suspects = Suspects()
        self.recent = RecentPrompts()
        self._manager = manager
        self._counters = counters
        self._requests: dict[str, list[Sequence]] = {}
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def waiting(self) -> list[Sequence]:
        """In order of priority and arrival, whosever they are."""
        return list(merge(*(one.waiting for one in self.fair_share.active), key=arrival))

    def add(self, request_id: str, sequences: list[Sequence]) -> None:
        """Queues the sequences of a new request."""
        self.fair_share.begin(sequences[0].account, len(sequences))
        for sequence in sequences:
            self._wait(sequence)
        self._requests[request_id] = sequences

    def _wait(self, sequence: Sequence) -> None:
        sequence.account.wait(sequence)
        self.num_waiting += 1

    def unfinished_of(self, request_id: str) -> list[Sequence]:
        return [one for one in self._requests.get(request_id, ()) if not one.is_finished]

    def leader_of(self, sequence: Sequence) -> Sequence | None:
        """Returns the first sample of the same request, if this one can still take its prompt
        over."""
        if sequence.index == 0 or sequence.num_outputs:
            return None
        leader = self._requests[sequence.request.request_id][0]
        return None if leader.is_finished else leader

    @property
    def running_rows(self) -> Int32:
        """[running] the row of each, until one starts or stops."""
        return self._running_rows[: len(self.running)]

    def place_of(self, sequence: Sequence) -> int:
        """Returns where a running sequence stands among the running ones."""
        place = bisect_left(self.running, sequence.order, key=arrival)
        assert self.running[place] is sequence
        return place

    @property
    def next_row(self) -> int | None:
        """The row that the next to start will have; None if all are taken."""
        return self._free_rows[-1] if self._free_rows else None

    def start(self, sequence: Sequence, num_computed: int) -> None:
        """A waiting sequence runs, in `next_row`, with so many tokens computed already."""
        if sequence.scheduled_time is None:
            sequence.scheduled_time = time.monotonic()
        sequence.num_computed = num_computed
        row = self._free_rows.pop()
        sequence.take_row(self.rows, row)
        self._stop_waiting(sequence)
        sequence.account.num_running += 1
        running, count = self.running, len(self.running)
        if not count or running[-1].order < sequence.order:
            place = count  # nearly always: who came last starts last
        else:
            place = bisect_left(running, sequence.order, key=arrival)
            self._running_rows[place + 1 : count + 1] = self._running_rows[place:count]
        running.insert(place, sequence)
        self._running_rows[place] = row

    def _stop_waiting(self, sequence: Sequence) -> None:
        sequence.account.leave(sequence)
        self.num_waiting -= 1

    def _stop_running(self, sequences: PySequence[Sequence]) -> None:
        count = len(self.running)
        for sequence in sequences:
            sequence.account.num_running -= 1
        if len(sequences) == 1:
            place = self.place_of(sequences[0])
            del self.running[place]
            self._running_rows[place : count - 1] = self._running_rows[place + 1 : count]
            return
        leaving = set(sequences)
        kept = [place for place, one in enumerate(self.running) if one not in leaving]
        self.running = [self.running[place] for place in kept]
        self._running_rows[: len(kept)] = self._running_rows[kept]

    def preempt(self, sequence: Sequence) -> None:
        """Takes pages and row away; what it computed stays cached while nobody needs the room."""
        self.publish(sequence)
        self._stop_running([sequence])
        if sequence.moments is not None:
            now = time.monotonic()
            sequence.moments.append(Moment("preempted", now, now, count=sequence.num_computed))
        sequence.num_preemptions += 1
        sequence.num_recomputed += sequence.num_computed
        sequence.num_computed = 0
        self._release([sequence])
        self._wait(sequence)
        self._counters.num_preemptions += 1

    def finish(self, sequences: PySequence[Sequence]) -> None:
        """Ends sequences that have not ended."""
        if not sequences:
            return  # most steps
        running = [one for one in sequences if one.row is not None]
        for sequence in sequences:
            sequence.is_finished = True
            self.suspects.forget(sequence)
            if sequence.row is None:
                self._stop_waiting(sequence)
            self.fair_share.end(sequence.account)
        if running:
            self._stop_running(running)
        for sequence in sequences:
            self.publish(sequence)
            self.recent.remember(prompt_of(sequence))
        self._release(sequences)
        for request_id in {one.request.request_id: None for one in sequences}:
            if all(one.is_finished for one in self._requests[request_id]):
                del self._requests[request_id]

    def publish(self, sequence: Sequence) -> None:
        """Lets others find all full blocks of a running sequence that are computed."""
        if sequence.row is not None:
            computed = self.rows.committed.item(sequence.row)
            self._manager.publish(sequence.kv, sequence.token_ids, computed)

    def _release(self, sequences: PySequence[Sequence]) -> None:
        self._manager.release([one.kv for one in sequences])
        rows = [one.row for one in sequences if one.row is not None]
        self._freed_rows += rows
        self._free_rows += rows
        for sequence in sequences:
            if sequence.row is not None:
                sequence.leave_row()
        self.rows.leave(rows)

    def take_freed_rows(self) -> tuple[int, ...]:
        """Returns the rows given back since the last call."""
        freed, self._freed_rows = tuple(self._freed_rows), []
        return freed

    def check(self) -> None:
        """Raises AssertionError if queues, rows and pages contradict each other."""
        rows = [s.row for s in self.running if s.row is not None]
        assert rows == self.running_rows.tolist()
        assert self.rows.known[rows].tolist() == [len(s.token_ids) for s in self.running]
        assert self.rows.sequences[rows].tolist() == self.running
        assert sorted(self._free_rows + rows) == list(range(self._max_num_seqs))
        waiting = self.waiting
        assert len(waiting) == self.num_waiting
        assert all(s.row is None and s.kv.row is None for s in waiting)
        for account in self.fair_share.active:
            own = [s for s in self.running if s.account is account]
            assert account.num_running == len(own)
            assert account.num_unfinished == len(own) + len(account.waiting)
        assert all(s.kv.row == s.row for s in self.running)
        for s in self.running:
            self._manager.check_writable(s.kv, s.num_computed)
        self._manager.check(rows)
