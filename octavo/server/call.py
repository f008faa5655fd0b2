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
