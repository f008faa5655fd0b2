"""Decides which waiting sequences start in a step, and from what: a cached prefix, a sibling's
prompt, or nothing.

Called by the scheduler once the running ones have their tokens.
"""

from __future__ import annotations

import time

import numpy as np

from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.records import PrefixHit
from octavo.moments import Moment
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.fair_share import Account
from octavo.scheduler.forecast import Forecast, Growing
from octavo.scheduler.limits import SchedulerLimits
from octavo.scheduler.plan_builder import PlanBuilder
from octavo.scheduler.queues import Queues
from octavo.scheduler.rivals import Rivals, turn
from octavo.scheduler.sequence import Sequence


class Admission:
    """First come, first served, tenants in turn, while rows, budget and pages last."""

    def __init__(
        self,
        queues: Queues,
        manager: KVCacheManager,
        limits: SchedulerLimits,
        counters: SchedulerCounters,
        rivals: Rivals,
    ) -> None:
        self._queues = queues
        self._rivals = rivals
        self._manager = manager
        self._limits = limits
        self._counters = counters
        self._demands = manager.demands(limits.max_num_batched_tokens)

    def schedule(self, builder: PlanBuilder) -> None:
        """Admits waiting sequences in turn."""
        forecast, left_out = None, set[Account]()
        for sequence in self._queues.fair_share.in_turn(left_out):
            budget = self._budget(builder)
            if not budget or self._keeps_out(sequence):
                return
            if self._rivals.is_beyond_kv_share(sequence):
                left_out.add(sequence.account)
                continue
            if self._must_wait(sequence, builder):
                if sequence.runs_alone:
                    return  # whoever started now would run beside it
                continue
            forecast = forecast or self._forecast()
            count = self._fork(sequence, builder) or self._admit(sequence, budget, forecast)
            if count is None:
                return
            if count:
                self._join(sequence, count, builder, forecast)

    def claim(self, builder: PlanBuilder, num_decodes: int) -> None:
        """Admits those first whose tenants have had less than all whose prompts are under way, and
        has others make way for them; called before running ones have their tokens."""
        prefills, forecast, left_out = self._rivals.prefills(), None, set[Account]()
        for sequence in self._queues.fair_share.in_turn(left_out):
            others = [one for account, one in prefills.items() if account is not sequence.account]
            budget = builder.room - num_decodes
            if (others and turn(sequence) >= min(others)) or budget <= 0:
                return
            if self._keeps_out(sequence):
                return
            is_late = self._must_wait(sequence, builder) or self._queues.leader_of(sequence)
            if is_late or self._rivals.is_beyond_kv_share(sequence):
                left_out.add(sequence.account)  # It has its turn behind those that run.
                continue
            if not self._budget(builder) and not self._take_row(sequence, builder):
                return
            forecast = forecast or self._forecast()
            count = self._admit(sequence, budget, forecast)
            while count is None:
                victim = self._rivals.victim_for_room(sequence, builder.sequences)
                if victim is None:
                    return
                self._queues.preempt(victim)
                forecast = self._forecast()
                count = self._admit(sequence, budget, forecast)
            if count:
                self._join(sequence, count, builder, forecast)

    def _take_row(self, sequence: Sequence, builder: PlanBuilder) -> bool:
        """Has somebody give up its row; returns whether there is one now."""
        victim = self._rivals.victim_for_row(sequence, builder.sequences)
        if victim is None:
            return False
        self._queues.preempt(victim)
        return bool(self._budget(builder))

    def schedule_suspects(self, builder: PlanBuilder) -> None:
        """Admits the waiting ones of those that are computed with nobody beside them."""
        forecast = self._forecast()
        group = self._queues.suspects.group
        for sequence in [s for s in self._queues.waiting if s in group]:
            budget = self._budget(builder)
            if not budget or self._keeps_out(sequence):
                return
            count = self._admit(sequence, budget, forecast)
            if count is None:
                return
            if count:
                self._join(sequence, count, builder, forecast)

    def _budget(self, builder: PlanBuilder) -> int:
        """Returns the tokens that a sequence may begin with in this step, 0 if none may."""
        most = min(self._limits.max_num_seqs, self._limits.max_num_batched_tokens)
        if self._queues.next_row is None or len(self._queues.running) >= most:
            return 0
        return builder.room

    def _keeps_out(self, sequence: Sequence) -> bool:
        """Whether somebody runs beside whom `sequence` may not, or who may not beside it."""
        running = self._queues.running
        return bool(running) and (sequence.runs_alone or running[0].runs_alone)

    def _join(
        self, sequence: Sequence, count: int, builder: PlanBuilder, forecast: Forecast
    ) -> None:
        """An admitted sequence runs from this step on, which computes `count` tokens of it."""
        forecast.add(self._growing(sequence))
        builder.start_row(sequence)
        builder.add(sequence, count)

    # -- what it would take ------------------------------------------------------------------

    def _forecast(self) -> Forecast:
        """Returns what the running sequences will need, the rest of their prompts included."""
        manager = self._manager
        forecast = Forecast(
            self._limits.headroom_tokens,
            manager.block_size,
            len(manager.layout.classes),
            self._demands,
        )
        rows, size = self._queues.running_rows, manager.block_size
        if not len(rows):
            return forecast
        num_tokens = self._queues.rows.num_tokens(rows)
        left = np.maximum(self._queues.rows.max_lens[rows] - num_tokens, 0)
        held = manager.rows.capacity[rows] // size
        missing = np.maximum(-(-num_tokens // size) - held, 0)
        forecast.add_all(np.stack((num_tokens, left, missing, held)))
        forecast.share(manager.pools.referenced)
        return forecast

    def _growing(self, sequence: Sequence) -> Growing:
        """Returns what a sequence that starts will need. It gives nothing back, as far as the
        forecast cares: what of it is shared is known a step later. What one that waits lacks now,
        its admission counts."""
        num_tokens, size = sequence.num_tokens, self._manager.block_size
        missing = (
            0 if sequence.row is None else -(-num_tokens // size) - sequence.kv.capacity // size
        )
        num_left = max(sequence.max_len - num_tokens, 0)
        return Growing(num_tokens, num_left, max(missing, 0), 0)

    # -- where it starts from ----------------------------------------------------------------

    def _must_wait(self, sequence: Sequence, builder: PlanBuilder) -> bool:
        """Whether it would do twice what somebody is doing for it."""
        if sequence.num_pending:
            return True  # preempted, and its newest token is still on the way
        if sequence.guide is not None and not sequence.guide.is_ready:
            return True  # its grammar is being compiled
        leader = self._queues.leader_of(sequence)
        if leader is None:
            return False
        if leader.num_computed < leader.prompt_len:
            return True
        # Blocks are copied before a step computes: what is taken over must be of an earlier one.
        return builder.start_of(leader) < leader.prompt_len - 1

    def _fork(self, sequence: Sequence, builder: PlanBuilder) -> int | None:
        """Starts a parallel sample from its leader's blocks; returns 1, the prompt's last token,
        whose logits it needs; None if that cannot be."""
        leader, row = self._queues.leader_of(sequence), self._queues.next_row
        if leader is None or leader.row is None or row is None:
            return None
        computed, start = leader.prompt_len - 1, builder.start_of(leader)
        if not self._manager.fork(leader.kv, sequence.kv, row, computed, start):
            return None
        sequence.num_cached_tokens = leader.num_cached_tokens
        self._queues.start(sequence, computed)
        return 1

    def _admit(self, sequence: Sequence, budget: int, forecast: Forecast) -> int | None:
        """Starts a sequence; returns how many tokens it computes now, 0 if it should wait for a
        prefix, None if there is no room for it."""
        manager, row = self._manager, self._queues.next_row
        assert row is not None
        hit = manager.lookup(sequence.kv, sequence.token_ids)
        if hit.is_computing:
            return 0
        needed = manager.need(sequence.num_tokens, budget, hit)
        room = manager.room(hit)
        if self._queues.running:
            if not forecast.fits(self._growing(sequence), room, needed):
                return None
        elif sequence.runs_alone or not room.fits(needed):
            # What it would take over may lie in chunks that others of its pages need whole.
            sequence.runs_alone = True
            hit = manager.without(hit)
            step_tokens = self._limits.max_num_batched_tokens
            if not manager.claim(sequence.kv, sequence.max_len, step_tokens):
                return None
        cached = hit.num_blocks * manager.block_size
        end = chunk_end(sequence, manager, cached, min(sequence.num_tokens, cached + budget))
        if not manager.admit(sequence.kv, row, hit, end):
            return None
        self._count_lookup(sequence, hit)
        self._queues.start(sequence, cached)
        return end - cached

    def _count_lookup(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Only the first admission is a query: recomputing after preemption is not a hit."""
        size = self._manager.block_size
        cached = hit.num_blocks * size
        if sequence.moments is not None:
            self._note_lookup(sequence, hit, cached)
        if sequence.num_preemptions:
            lost = sequence.num_recomputed - cached
            self._counters.num_recomputed_tokens += max(lost, 0)
            sequence.num_recomputed = 0
            return
        sequence.num_cached_tokens = cached
        if sequence.kv.reads_cache:
            length = sequence.prompt_len
            cacheable = (length - 1) // size * size
            self._counters.count_lookup(length, cached, cacheable, hit.miss_reason)

    def _note_lookup(self, sequence: Sequence, hit: PrefixHit, cached: int) -> None:
        assert sequence.moments is not None
        now, reason = time.monotonic(), hit.miss_reason or ""
        if not sequence.kv.reads_cache:
            reason = "off"
        moment = Moment("lookup", now, now, len(sequence.token_ids), cached, reason)
        sequence.moments.append(moment)


def chunk_end(sequence: Sequence, manager: KVCacheManager, start: int, end: int) -> int:
    """Returns where a chunk of a prompt ends that may reach to `end`: where states of the model can
    be kept, if it has any."""
    if not manager.has_states:
        return end
    last = sequence.prompt_len - 1
    stops = [last // manager.block_size * manager.block_size]
    if sequence.request.params.n > 1:  # samples fork from here
        stops.append(last)
    return manager.chunk_end(sequence.kv, start, end, stops)
