"""What a router knows of its engines, request by request, and whom it therefore chooses.

One per front process of a fleet, or per router of Ray Serve. Not thread-safe, no clock, no I/O:
whoever owns it tells what was sent, begun, ended and stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from octavo.fleet.holdings import DEFAULT_CAPACITY, Holdings
from octavo.fleet.policy import MEMORY_TOKENS, Candidate, Recent, choose

GUESSED_OUTPUTS = 128
"""Tokens that an answer counts for, if it may be as long: how long it will be nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, as far as it matters who takes it."""

    request_id: str
    num_tokens: int
    """Of the prompt."""
    num_outputs: int
    """Tokens that all its sequences may have."""
    hashes: Sequence[int] = ()
    """Of the prompt's full blocks, each standing for all before it; none: unknown."""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Who was chosen, and for how much."""

    name: str
    num_cached: int
    """Tokens of the prompt that it holds, as far as is known."""


@dataclass(slots=True)
class _Open:
    name: str
    tenant: str
    prompt_work: float
    output_work: float

    @property
    def work(self) -> float:
        return self.prompt_work + self.output_work


class _Engine:
    def __init__(self, capacity: int) -> None:
        self.holdings = Holdings(capacity)
        self.work = 0.0
        self.num_open = 0
        self.others_open = 0
        """Requests there that other routers sent."""
        self.tenant_work: dict[str, float] = {}

    def add(self, one: _Open, sign: int) -> None:
        self.num_open += sign
        self.add_work(one.tenant, sign * one.work)

    def add_work(self, tenant: str, work: float) -> None:
        self.work += work
        total = self.tenant_work.get(tenant, 0.0) + work
        if self.num_open:
            self.tenant_work[tenant] = total
        else:  # what is left are rounding errors, and tenants that went away
            self.work = 0.0
            self.tenant_work.clear()


class Router:
    """Chooses an engine for each request. Engines come and go by name."""

    def __init__(self, block_size: int, memory_tokens: float = MEMORY_TOKENS) -> None:
        self.block_size = block_size
        self._engines: dict[str, _Engine] = {}
        self._open: dict[str, _Open] = {}
        self._recent = Recent(memory_tokens)
        self._mean_work = float(GUESSED_OUTPUTS)

    # -- engines -------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._engines)

    def join(self, name: str, num_blocks: int = DEFAULT_CAPACITY) -> None:
        """An engine with a cache of so many blocks, empty as far as is known."""
        self._engines[name] = _Engine(num_blocks)

    def leave(self, name: str) -> None:
        """It takes no requests any more; what it held, and the requests that it had, are lost."""
        self._engines.pop(name, None)
        self._open = {key: one for key, one in self._open.items() if one.name != name}
        self._recent.forget(name)

    def stored(self, name: str, hashes: Iterable[int]) -> None:
        """The engine tells what it can be asked for."""
        if name in self._engines:
            self._engines[name].holdings.add(hashes)

    def removed(self, name: str, hashes: Iterable[int]) -> None:
        if name in self._engines:
            self._engines[name].holdings.remove(hashes)

    def cleared(self, name: str) -> None:
        if name in self._engines:
            self._engines[name].holdings.clear()

    def counted(self, name: str, num_open: int) -> None:
        """The engine tells how many requests it has, of all routers."""
        if name in self._engines:
            engine = self._engines[name]
            engine.others_open = max(num_open - engine.num_open, 0)

    # -- requests ------------------------------------------------------------------------------

    def route(self, ask: Ask, without: Collection[str] = ()) -> Choice | None:
        """Returns who takes the request, which is open there from now on; None if nobody is left
        but `without`."""
        self.end(ask.request_id)
        names = [name for name in self._engines if name not in without]
        if not names:
            return None
        candidates = [self._candidate(name, ask) for name in names]
        best = candidates[choose(candidates, ask.num_tokens, self._key(ask))]
        outputs = float(min(ask.num_outputs, GUESSED_OUTPUTS))
        self.send(best.name, ask, outputs)
        return Choice(best.name, best.num_cached)

    def send(self, name: str, ask: Ask, outputs: float) -> None:
        """Notes that `ask` goes to `name`, whoever chose that."""
        engine = self._engines[name]
        missing = ask.num_tokens - self._num_cached(engine, ask)
        opened = _Open(name, ask.tenant, float(missing), outputs)
        engine.holdings.add(ask.hashes)
        engine.add(opened, 1)
        self._open[ask.request_id] = opened
        self._recent.add(name, opened.work, len(self._engines))
        self._mean_work += (opened.work - self._mean_work) / 16

    def _candidate(self, name: str, ask: Ask) -> Candidate:
        engine = self._engines[name]
        return Candidate(
            name=name,
            num_cached=self._num_cached(engine, ask),
            work=engine.work + engine.others_open * self._mean_work,
            recent=self._recent.of(name),
            tenant_work=engine.tenant_work.get(ask.tenant, 0.0) if ask.tenant else 0.0,
        )

    def _num_cached(self, engine: _Engine, ask: Ask) -> int:
        found = engine.holdings.num_leading(ask.hashes) * self.block_size
        return min(found, max(ask.num_tokens - 1, 0))  # the last is always computed

    def _key(self, ask: Ask) -> str:
        """The whole prompt's: what shares only its beginning may part, and is spread."""
        return f"{ask.tenant}:{ask.hashes[-1] if ask.hashes else ask.request_id}"

    def begun(self, request_id: str) -> None:
        """Its first token is there: the prompt is no work any more."""
        opened = self._open.get(request_id)
        if opened is not None and opened.prompt_work:
            self._engines[opened.name].add_work(opened.tenant, -opened.prompt_work)
            opened.prompt_work = 0.0

    def end(self, request_id: str) -> None:
        """It is answered, aborted or lost; a late call is harmless."""
        opened = self._open.pop(request_id, None)
        if opened is not None:
            self._engines[opened.name].add(opened, -1)

    def work_of(self, name: str) -> float:
        """Returns the tokens under way at an engine, of this router's requests."""
        return self._engines[name].work

    def num_open(self, name: str) -> int:
        return self._engines[name].num_open
