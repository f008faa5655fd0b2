"""What is done for tenants beside others: a turn before those that have had more, and a row or room
where others hold more than their share.

Asked by the scheduler and by admission only where several tenants have work. Decides who, never
how much a step computes; it moves nothing itself.

A tenant's share of rows and of room is its weight over the weights of all that have work. Whoever
is below it may have one of those above it preempted, who keep their oldest: so each tenant that
runs goes on, nobody is preempted below its share, and nothing goes to and fro.
"""

from __future__ import annotations

from collections.abc import Collection

from octavo.scheduler.fair_share import Account
from octavo.scheduler.limits import SchedulerLimits
from octavo.scheduler.queues import Queues
from octavo.scheduler.sequence import Sequence

Turn = tuple[int, float]
"""Priority and virtual time; the smaller goes first."""


class Rivals:
    """The tenants that run, beside each other."""

    def __init__(self, queues: Queues, limits: SchedulerLimits) -> None:
        self._queues = queues
        self._limits = limits

    # -- turns -------------------------------------------------------------------------------

    def prefills(self) -> dict[Account, Turn]:
        """Returns the tenants that have prompts under way, with their best turn."""
        found: dict[Account, Turn] = {}
        for sequence in self._queues.running:
            if sequence.num_tokens - sequence.num_computed > 1:
                # In order of priority: the first is the best.
                found.setdefault(sequence.account, turn(sequence))
        return found

    def grants(self, budget: int) -> dict[Sequence, int]:
        """Returns what each prompt under way gets of a step's budget, in turn."""
        prompts = [s for s in self._queues.running if s.num_tokens - s.num_computed > 1]
        prompts.sort(key=lambda one: (*turn(one), one.order))
        found: dict[Sequence, int] = {}
        for sequence in prompts:
            found[sequence] = count = min(sequence.num_tokens - sequence.num_computed, budget)
            budget -= count
        return found

    # -- who makes way -----------------------------------------------------------------------

    def victim_for_row(self, sequence: Sequence, kept: Collection[Sequence]) -> Sequence | None:
        """Returns who gives up its row for a waiting sequence; None if its tenant has its share
        already, or nobody has more. Those `kept` are none of them."""
        share, rows = self._queues.fair_share, self._limits.max_num_seqs
        if sequence.account.num_running + 1 > share.part_of(sequence.account) * rows:
            return None
        over = {
            one: one.num_running / one.weight
            for one in share.active
            if one.num_running > share.part_of(one) * rows
        }
        return self._youngest(sequence, over, kept)

    def victim_for_room(self, sequence: Sequence, kept: Collection[Sequence]) -> Sequence | None:
        """As `victim_for_row`, for want of KV: of what is held, the waiting one would have no more
        than its tenant's share."""
        held, share = self._held(), self._queues.fair_share
        total = sum(held.values()) + sequence.num_tokens
        own = held.get(sequence.account, 0) + sequence.num_tokens
        if own > share.part_of(sequence.account) * total:
            return None
        over = {
            one: count / one.weight
            for one, count in held.items()
            if count > share.part_of(one) * total
        }
        return self._youngest(sequence, over, kept)

    def victim_of_growth(self, position: int, kept: Collection[Sequence]) -> Sequence | None:
        """Returns who gives up its room to what runs at `position`, itself or one behind it: the
        youngest of those that hold more than their share, which are not their tenant's oldest."""
        held, share = self._held(), self._queues.fair_share
        total = sum(held.values())
        over = {one for one, count in held.items() if count > share.part_of(one) * total}
        oldest = self._oldest()
        for one in reversed(self._queues.running[position:]):
            if one.account in over and one is not oldest[one.account] and one not in kept:
                return one
        return None

    def _youngest(
        self, sequence: Sequence, over: dict[Account, float], kept: Collection[Sequence]
    ) -> Sequence | None:
        """Returns the youngest of the tenant that is furthest over, whose priority is no better."""
        oldest = self._oldest()
        found: Sequence | None = None
        for one in reversed(self._queues.running):
            if one.request.priority < sequence.request.priority:
                break
            if one.account not in over or one is oldest[one.account]:
                continue
            if one in kept or one.runs_alone:
                continue
            if found is None or over[one.account] > over[found.account]:
                found = one
        return found

    def _oldest(self) -> dict[Account, Sequence]:
        found: dict[Account, Sequence] = {}
        for one in self._queues.running:
            found.setdefault(one.account, one)
        return found

    def _held(self) -> dict[Account, int]:
        """Returns the tokens for which each tenant's running sequences hold room."""
        held: dict[Account, int] = {}
        for one in self._queues.running:
            held[one.account] = held.get(one.account, 0) + one.kv.capacity
        return held

    def is_beyond_kv_share(self, sequence: Sequence) -> bool:
        """Whether its tenant would hold more of the cache than it may; one sequence it always
        may."""
        account, most = sequence.account, self._limits.num_kv_tokens
        if account.kv_share >= 1.0 or not account.num_running or not most:
            return False
        held = self._held().get(account, 0)
        return held + sequence.num_tokens > account.kv_share * most


def turn(sequence: Sequence) -> Turn:
    """Returns what decides which of two sequences of different tenants goes first."""
    return sequence.request.priority, sequence.account.virtual_time
