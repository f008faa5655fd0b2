"""Whose turn it is where several tenants have work: virtual time, in computed tokens by weight.

Kept by `Queues`, asked by admission and by the scheduler. Pure: it knows counts, never a clock, a
page or a row. Start-time fair queueing (Goyal, Vin, Cheng 1996), with the turns taken a step at a
time instead of a packet, and some credit for who comes back:

    virtual time of a tenant = what it had when it came + tokens computed since / weight
    when it comes            = its own from before, but at most its credit behind the least of those
                               that have work

Cached tokens are not computed, and so free. Of tenants that always have work, each gets computed
tokens in proportion to its weight, up to its credit and one step. One tenant alone never waits for
a turn: all that is asked of it is its arrival order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.request import Share
    from octavo.scheduler.sequence import Sequence

CREDIT_TOKENS = 8192
"""With weight 1, what a tenant that comes may have computed before the turns of others: enough for
a long prompt to start as if nobody else were there."""
_FORGOTTEN_ABOVE = 1024
"""Tenants without work that are remembered at least."""


def arrival(sequence: Sequence) -> tuple[int, int]:
    """Returns what sequences of one tenant are ordered by: priority, then arrival."""
    return sequence.order


class Account:
    """What a tenant has had, and its sequences that wait."""

    __slots__ = (
        "_base",
        "computed",
        "kv_share",
        "num_running",
        "num_unfinished",
        "tenant",
        "waiting",
        "weight",
    )

    def __init__(self, share: Share) -> None:
        self.tenant = share.tenant
        self.weight = share.weight
        self.kv_share = share.kv_share
        self.computed = 0
        """Tokens since `weight` is what it is."""
        self._base = 0.0
        self.num_unfinished = 0
        self.num_running = 0
        self.waiting: list[Sequence] = []
        """In order of priority and arrival."""

    @property
    def virtual_time(self) -> float:
        return self._base + self.computed / self.weight

    def advance(self, virtual_time: float) -> None:
        """It is at that virtual time, unless it is further."""
        self._base = max(self.virtual_time, virtual_time)
        self.computed = 0

    def take_terms(self, share: Share) -> None:
        """Its newest request says what it gets from now on."""
        if share.weight != self.weight:
            self.advance(self.virtual_time)
            self.weight = share.weight
        self.kv_share = share.kv_share

    def wait(self, sequence: Sequence) -> None:
        if not self.waiting or self.waiting[-1].order < sequence.order:
            self.waiting.append(sequence)
        else:
            insort(self.waiting, sequence, key=arrival)

    def leave(self, sequence: Sequence) -> None:
        """A waiting sequence starts, or has ended."""
        place = 0
        if self.waiting[0] is not sequence:  # nearly always it is
            place = bisect_left(self.waiting, sequence.order, key=arrival)
        assert self.waiting[place] is sequence
        del self.waiting[place]


class FairShare:
    """The accounts of all tenants."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._active: dict[str, Account] = {}
        """Those with work."""
        self._floor = 0.0
        """The least virtual time of those with work, as last seen; it never falls."""

    @property
    def has_rivals(self) -> bool:
        """Whether several tenants have work."""
        return len(self._active) > 1

    @property
    def active(self) -> Iterator[Account]:
        """The tenants with work."""
        return iter(self._active.values())

    def part_of(self, account: Account) -> float:
        """Returns the part of everything that is a tenant's fair share now."""
        return account.weight / sum(one.weight for one in self._active.values())

    def account(self, share: Share) -> Account:
        """Returns the account of a tenant, with the terms of its newest request."""
        account = self._accounts.get(share.tenant)
        if account is None:
            account = self._accounts[share.tenant] = Account(share)
        account.take_terms(share)
        return account

    def begin(self, account: Account, count: int) -> None:
        """A tenant has `count` sequences more."""
        if not account.num_unfinished:
            self._raise_floor()
            account.advance(self._floor - CREDIT_TOKENS / account.weight)
            self._active[account.tenant] = account
        account.num_unfinished += count

    def end(self, account: Account) -> None:
        """One of its sequences has ended."""
        account.num_unfinished -= 1
        if not account.num_unfinished:
            self._raise_floor()
            del self._active[account.tenant]
            self._forget()

    def _raise_floor(self) -> None:
        if self._active:
            least = min(one.virtual_time for one in self._active.values())
            self._floor = max(self._floor, least)

    def _forget(self) -> None:
        """Drops the accounts of those who would come back as if they were new."""
        if len(self._accounts) > _FORGOTTEN_ABOVE + 2 * len(self._active):
            self._accounts = {
                name: one
                for name, one in self._accounts.items()
                if one.num_unfinished or one.virtual_time > self._floor - CREDIT_TOKENS / one.weight
            }

    def in_turn(self, left_out: Container[Account]) -> Iterator[Sequence]:
        """Yields who waits: by priority, then of the tenant that is furthest behind, then by
        arrival. Sequences may start meanwhile, which counts at once; whoever is `left_out` by then
        has no turn."""
        turns = [_turn(one, 0) for one in self._active.values() if one.waiting]
        heapify(turns)
        while turns:
            _, _, _, place, account = heappop(turns)
            if account in left_out:
                continue
            sequence = account.waiting[place]
            yield sequence
            if place < len(account.waiting) and account.waiting[place] is sequence:
                place += 1
            if place < len(account.waiting):
                heappush(turns, _turn(account, place))


def _turn(account: Account, place: int) -> tuple[int, float, int, int, Account]:
    """Returns what turns are compared by: no two sequences have the same arrival."""
    priority, arrived = account.waiting[place].order
    return priority, account.virtual_time, arrived, place, account
