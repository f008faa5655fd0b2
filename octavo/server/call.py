"""One call of the API on its way to the engine.

Made by `generation` and `vector_calls`; read by whoever formats its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.request import Request, SamplingParams
from octavo.server.exchange import Exchange
from octavo.server.guards.call import CallGuard
from octavo.server.tenants.callers import NOBODY, Tenant

LISTED_AT_ONCE = 2**19
"""Tokens that the running requests of one call may list together: to send them takes eight
milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the API; every prompt in it is one request of the engine."""

    id: str
    """What the client sees."""
    created: int
    params: SamplingParams
    requests: tuple[Request, ...]
    exchange: Exchange
    """Where the access log finds what the call came to."""
    tenant: Tenant = NOBODY
    """Who pays for it."""
    marks: Mapping[int, str] | None = None
    """What stands in the text for the tokens of these ids."""
    guard: CallGuard | None = None
    """Who sees the answers before the client does."""

    def num_at_once(self, max_num_seqs: int) -> int:
        """Returns how many of its requests may run at once: as many sequences as a step holds, and
        few of those that list many tokens, since each is sent, and drawn, with all of them."""
        params = self.params
        lists = (params.logit_bias, params.allowed_token_ids, params.stop_token_ids)
        num_listed = params.n * sum(len(one) for one in lists if one)
        most_seqs = max_num_seqs // params.n
        return max(1, min(most_seqs, LISTED_AT_ONCE // max(1, num_listed)))
