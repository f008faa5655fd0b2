"""How much a tenant may ask for: requests and tokens a minute, tokens a day, requests at once.

`check` is asked before a body is read, `take` before a call is sent to the engine; the lease that
it returns is settled with what was really used. Counts are one over all front processes.

Each budget is a bucket that fills up evenly: a limit of 60 a minute lets 60 pass at once, and one a
second from then on. A call takes its prompt and the most that it may answer, and gets back what it
did not use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from octavo.request import Request
from octavo.server.errors import ApiError
from octavo.server.tenants.callers import NO_LIMITS, Limits, Tenant
from octavo.server.tenants.counts import SharedCounts, Usage

UNSTATED_TOKENS = 512
"""What an answer is taken for whose client sets no limit, until it ends."""
CODE = "rate_limit_exceeded"
TOO_LARGE = "request_exceeds_budget"
Header = tuple[bytes, bytes]


class _Meter(NamedTuple):
    """A budget as it is looked up: where it is counted, and how it is called."""

    place: int
    field: str
    kind: str
    seconds: float


METERS = (
    _Meter(0, "requests_per_minute", "requests", 60.0),
    _Meter(1, "tokens_per_minute", "tokens", 60.0),
    _Meter(2, "tokens_per_day", "tokens", 86400.0),
)


class Budgets:
    """The budgets of all tenants. One event loop's; its counts are shared."""

    def __init__(self, counts: SharedCounts, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds that are the same in all processes."""
        self._counts = counts
        self._clock = clock
        self.num_refused = 0

    def check(self, tenant: Tenant) -> None:
        """Raises ApiError (429) if not even the smallest request would be let in now."""
        if tenant.limits.is_counted:
            now = self._clock()
            with self._counts.usage(tenant.id, now) as usage:
                self._refuse_beyond(tenant.limits, usage, (1, 1, 1), now, is_counted=True)

    def take(self, tenant: Tenant, num_tokens: int, is_batch: bool = False) -> Lease:
        """Returns the lease of a call that may use so many tokens. Raises ApiError: 429, or 400 if
        it is more than the tenant ever has. Lines of batches have a pace of their own: only their
        tokens count."""
        if not tenant.limits.is_counted:
            return NO_LEASE
        now, amounts = self._clock(), (0 if is_batch else 1, num_tokens, num_tokens)
        with self._counts.usage(tenant.id, now) as usage:
            self._refuse_beyond(tenant.limits, usage, amounts, now, is_counted=not is_batch)
            for meter, limit in _limited(tenant.limits):
                used = _used(usage, meter, limit, now)
                usage.meters[meter.place] = [used + amounts[meter.place], now]
            usage.num_open += not is_batch
            facts = [*_facts(tenant.limits, usage, now)]
        return Lease(self, tenant, is_batch, facts)

    def give_back(self, tenant: Tenant, num_tokens: float) -> None:
        """So many tokens less were used; more, if it is negative."""
        now = self._clock()
        with self._counts.usage(tenant.id, now) as usage:
            for meter, limit in _limited(tenant.limits):
                if meter.kind == "tokens":
                    used = _used(usage, meter, limit, now)
                    usage.meters[meter.place] = [max(0.0, used - num_tokens), now]

    def close(self, tenant: Tenant) -> None:
        """A call of the tenant has ended."""
        with self._counts.usage(tenant.id, self._clock()) as usage:
            usage.num_open = max(0, usage.num_open - 1)

    def end(self) -> None:
        """The server has ended."""
        self._counts.close()

    def _refuse_beyond(
        self,
        limits: Limits,
        usage: Usage,
        amounts: tuple[int, ...],
        now: float,
        is_counted: bool,
    ) -> None:
        # First those that never suffice: waiting for another would be in vain.
        meters = sorted(_limited(limits), key=lambda one: amounts[one[0].place] <= one[1])
        for meter, limit in meters:
            amount = amounts[meter.place]
            used = _used(usage, meter, limit, now)
            if amount and used + amount > limit:
                self.num_refused += 1
                raise _beyond(meter, limit, used, amount, [*_facts(limits, usage, now)])
        most = limits.max_concurrent
        if most is not None and is_counted and usage.num_open >= most:
            self.num_refused += 1
            message = f"{usage.num_open} of your requests are open (max_concurrent {most}); wait"
            headers = {"Retry-After": "1", **_headers(_facts(limits, usage, now))}
            raise ApiError(429, message, code=CODE, kind="requests", headers=headers)


class Lease:
    """What one call has taken."""

    __slots__ = ("_budgets", "_is_batch", "_is_open", "_tenant", "facts")

    def __init__(
        self, budgets: Budgets | None, tenant: Tenant | None, is_batch: bool, facts: list[Fact]
    ) -> None:
        self._budgets = budgets
        self._tenant = tenant
        self._is_batch = is_batch
        self._is_open = True
        self.facts = facts
        """What the client is told of its budgets."""

    def settle(self, num_taken: int, num_used: int) -> None:
        """A request of the call used so many tokens of those that were taken for it."""
        if self._budgets is not None and self._tenant is not None and num_taken != num_used:
            self._budgets.give_back(self._tenant, num_taken - num_used)

    def close(self) -> None:
        """The call has ended. May be called twice."""
        if self._budgets is not None and self._tenant is not None and self._is_open:
            self._is_open = False
            if not self._is_batch:
                self._budgets.close(self._tenant)


class Fact(NamedTuple):
    """A budget as its client is told."""

    kind: str
    limit: int
    remaining: int
    reset_seconds: float


NO_LEASE = Lease(None, None, False, [])


def reserved(request: Request, is_stated: bool) -> int:
    """Returns the tokens that are taken for a request before it runs; `is_stated`: its client has
    set a limit to the answer."""
    if request.wants_vector:
        return request.prompt_len
    most = request.params.max_tokens or UNSTATED_TOKENS
    each = most if is_stated else min(most, UNSTATED_TOKENS)
    return request.prompt_len + request.params.n * each


def header_list(facts: list[Fact], is_message: bool) -> list[Header]:
    """Returns the headers of an answer: OpenAI's, and Anthropic's on its routes."""
    found = _headers(facts)
    if is_message:
        for fact in facts:
            start = f"anthropic-ratelimit-{fact.kind}-"
            reset = datetime.now(UTC) + timedelta(seconds=math.ceil(fact.reset_seconds))
            found[start + "limit"] = str(fact.limit)
            found[start + "remaining"] = str(fact.remaining)
            found[start + "reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
    return [(name.encode(), value.encode()) for name, value in found.items()]


def _headers(facts: Iterator[Fact] | list[Fact]) -> dict[str, str]:
    found: dict[str, str] = {}
    for fact in facts:
        found[f"x-ratelimit-limit-{fact.kind}"] = str(fact.limit)
        found[f"x-ratelimit-remaining-{fact.kind}"] = str(fact.remaining)
        found[f"x-ratelimit-reset-{fact.kind}"] = _duration(fact.reset_seconds)
    return found


def _limited(limits: Limits) -> Iterator[tuple[_Meter, int]]:
    if limits is NO_LIMITS:
        return
    for meter in METERS:
        limit = getattr(limits, meter.field)
        if limit is not None:
            yield meter, limit


def _used(usage: Usage, meter: _Meter, limit: int, now: float) -> float:
    """Returns what is used of a budget by now: what was used, less what has filled up since."""
    used, at = usage.meters[meter.place]
    return max(0.0, used - (now - at) * limit / meter.seconds)


def _facts(limits: Limits, usage: Usage, now: float) -> Iterator[Fact]:
    """Yields the budgets a minute, or that of a day where there is none of its kind."""
    told: set[str] = set()
    for meter, limit in _limited(limits):
        if meter.kind not in told:
            told.add(meter.kind)
            used = _used(usage, meter, limit, now)
            remaining = max(0, math.floor(limit - used))
            yield Fact(meter.kind, limit, remaining, used * meter.seconds / limit)


def _beyond(meter: _Meter, limit: int, used: float, amount: int, facts: list[Fact]) -> ApiError:
    period = "day" if meter.seconds > 60 else "minute"
    if amount > limit:
        # No 429: clients come back after one, and would never be let in.
        message = (
            f"the request may use {amount} {meter.kind}, more than your {limit} a {period}; send "
            "less, or ask for a smaller max_tokens"
        )
        return ApiError(400, message, code=TOO_LARGE, headers=_headers(facts))
    seconds = max(1, math.ceil((used + amount - limit) * meter.seconds / limit))
    message = (
        f"rate limit reached: {limit} {meter.kind} a {period}, {math.ceil(used)} used, "
        f"{amount} asked for; try again in {_duration(seconds)}"
    )
    headers = {"Retry-After": str(seconds), **_headers(facts)}
    return ApiError(429, message, code=CODE, kind=meter.kind, headers=headers)


def _duration(seconds: float) -> str:
    """Returns a time as OpenAI's headers spell it: 250ms, 12s, 6m0s, 1h2m3s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
