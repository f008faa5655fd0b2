"""Who gets which prompt: the engine that computes least for it, unless that has much to do already.

Pure: numbers in, a choice out. Asked by the fleet of a host (`engine.fleet`) and by the request
router of Ray Serve (`deploy.router`). Knows no engine, no clock and no digest.

    cost of an engine = tokens of the prompt that it must compute, times MISSING_WEIGHT
                      + its work under way and its share of recent work, beyond the least of all
                      + the work of the same tenant that is under way there

What an engine did lately counts beside what it has to do, so that a prefix that everybody asks for
does not keep one engine busy while others idle between requests; a prefix that is asked for more
than one engine's share is computed a second time elsewhere. A tenant's own work counts twice, since
it is behind that work that its next request waits where engines share out time by tenant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY_TOKENS = 65_536
"""Of recent work, by engine: after so many tokens a share of 1/e of it still counts."""
RECENT_WEIGHT = 0.5
"""What a token done lately counts beside one under way."""
MISSING_WEIGHT = 8.0
"""What a token that must be computed counts: a prefix that is in two caches takes room in both, and
what it displaces will be computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An engine that can take the request, as its router sees it. All in tokens."""

    name: str
    """The same for every router of the fleet: where engines are equal, names decide."""
    num_cached: int = 0
    """Leading tokens of the prompt that it holds."""
    work: float = 0.0
    """That is under way or waits."""
    recent: float = 0.0
    """Work of the last while (`Recent`)."""
    tenant_work: float = 0.0
    """The part of `work` that is of the same tenant."""


def choose(candidates: Sequence[Candidate], num_tokens: int, key: str) -> int:
    """Returns the place of the engine that should take a prompt of `num_tokens`.

    `key` names what should stay together where all else is equal: routers that know nothing of each
    other then decide alike. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("there is no engine to choose from")
    least = min(one.recent for one in candidates)

    def cost(place: int) -> tuple[float, int]:
        one = candidates[place]
        busy = one.work + one.tenant_work + RECENT_WEIGHT * (one.recent - least)
        missing = max(num_tokens - one.num_cached, 0)
        return MISSING_WEIGHT * missing + busy, _rank(key, one.name)

    return min(range(len(candidates)), key=cost)


def _rank(key: str, name: str) -> int:
    """Rendezvous hashing: the order of engines differs by key and stays when one leaves."""
    digest = hashlib.blake2b(f"{len(key)}:{key}{name}".encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


class Recent:
    """The work of the last while by engine: each token given out makes older ones count less."""

    def __init__(self, memory_tokens: float = MEMORY_TOKENS) -> None:
        self._memory = memory_tokens
        self._work: dict[str, float] = {}

    def add(self, name: str, work: float, num_engines: int) -> None:
        """Engine `name`, one of `num_engines`, was given so many tokens of work."""
        keep = 1 / (1 + work / (self._memory * num_engines))
        for other in self._work:
            self._work[other] *= keep
        self._work[name] = self._work.get(name, 0.0) + work

    def of(self, name: str) -> float:
        return self._work.get(name, 0.0)

    def forget(self, name: str) -> None:
        self._work.pop(name, None)
