"""One front end's side of a fleet: which engine has which request, and where the next one goes.

Owned by `fleet`, in whose event loop it lives; to AsyncLLM it is what `link` is of one engine.
Never starts or ends an engine.

    add       routed (octavo.fleet), sent; one that the engine has no room for goes to the next
    leave     an engine gets nothing new; what it has it ends
    a death   what has begun there fails; what has not is sent to another engine, but not for ever:
              it may be what engines die of
    the end   when no engine is left, unless others start new ones
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from octavo.engine.ipc import Deltas, Held
from octavo.engine.link import Link, LinkOwner
from octavo.engine.prefixes import RequestHasher
from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.fleet.router import Ask, Router
from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.fleet_stats import total_stats
from octavo.observe.stats import EngineStats
from octavo.request import Request
from octavo.request_limits import MAX_INT

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""A request that so many engines have died under is sent to no other."""


@dataclass(slots=True)
class _Open:
    """A request that is not answered to the end."""

    request: Request
    ask: Ask
    engine: int
    link: Link
    num_running: int
    """Of its sequences."""
    num_deaths: int = 0
    """Of engines that had it."""
    has_begun: bool = False
    """Whether anything of the answer was passed on: then it cannot be computed elsewhere."""
    is_aborted: bool = False


class MemberOwner:
    """The owner of one engine's link: passes its news on with the engine's number."""

    def __init__(self, fleet: FleetLink, engine: int) -> None:
        self._fleet = fleet
        self._engine = engine

    def on_deltas(self, message: Deltas) -> None:
        self._fleet.on_deltas(message)

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        self._fleet.on_refused(self._engine, request_id, error)

    def on_death(self, error: EngineDeadError) -> None:
        self._fleet.on_death(self._engine, error)

    def on_held(self, message: Held) -> None:
        self._fleet.on_held(self._engine, message)


class FleetLink:
    """The links to all engines, by number."""

    def __init__(
        self,
        owner: LinkOwner,
        front: int,
        size: int,
        on_leave: Callable[[int, EngineDeadError], None] | None = None,
        *,
        is_lasting: bool = False,
    ) -> None:
        """`on_leave` is told which engine has died, and why. `is_lasting`: it does not end with its
        last engine, as others start new ones."""
        self.front = front
        self.prefix = f"{front}-"
        self._owner = owner
        self._size = size
        self._on_leave = on_leave
        self._is_lasting = is_lasting
        self._error: EngineDeadError | None = None
        self._links: dict[int, Link] = {}
        self._names: dict[int, str] = {}
        """Of engines that take requests, as routers know them."""
        self._router: Router | None = None
        self._hasher: RequestHasher | None = None
        self._open: dict[str, _Open] = {}
        self._refusals: dict[str, set[int]] = {}

    @property
    def error(self) -> EngineDeadError | None:
        return self._error

    # -- engines ---------------------------------------------------------------------------------

    @property
    def engines(self) -> list[int]:
        """Those that take requests."""
        return list(self._links)

    def prepare(self, hasher: RequestHasher) -> None:
        """To be called once, before the first engine joins."""
        self._hasher, self._router = hasher, Router(hasher.block_size)
        if hasher.is_off:
            logger.info("prefix_caching is off: requests go where the load is least")

    def join(self, engine: int, link: Link, plan: MemoryPlan, name: str | None = None) -> None:
        """From now on an engine takes requests; `name` is the same for all front ends, its number
        if not given."""
        assert self._router is not None, "prepared"
        self._links[engine] = link
        self._names[engine] = name or str(engine)
        self._router.join(self._names[engine], plan.num_blocks)

    def leave(self, engine: int) -> None:
        """It gets no requests any more, and ends those that it has. A late call is harmless."""
        if self._links.pop(engine, None) is not None and self._router is not None:
            self._router.leave(self._names.pop(engine))

    def on_held(self, engine: int, message: Held) -> None:
        name = self._names.get(engine)
        if self._router is None or name is None:
            return
        if message.is_cleared:
            self._router.cleared(name)
        self._router.removed(name, array("Q", message.removed))
        self._router.stored(name, array("Q", message.stored))
        self._router.counted(name, message.num_open)

    def on_death(self, engine: int, error: EngineDeadError) -> None:
        """Its requests fail or go elsewhere; the last one's death is the fleet's."""
        if engine not in self._links:
            return  # it had not joined
        self.leave(engine)
        if self._on_leave is not None:
            self._on_leave(engine, error)
        if not self._links and not self._is_lasting:
            self.die(EngineDeadError(f"engine {engine}, the last of {self._size}: {error}"))
            return
        lost = EngineDeadError(
            f"engine {engine} of {self._size}: {error}; the others go on, send the request again"
        )
        for opened in [one for one in self._open.values() if one.engine == engine]:
            self._lose(opened, lost)

    def on_lost(self, engine: int, request_id: str, error: EngineDeadError) -> None:
        """An engine has died under a request of ours, or lost it."""
        opened = self._open.get(request_id)
        if opened is not None and opened.engine == engine:
            self._lose(opened, error, {engine})

    def _lose(self, opened: _Open, error: EngineDeadError, without: Collection[int] = ()) -> None:
        opened.num_deaths += 1
        if opened.has_begun or opened.is_aborted or opened.num_deaths >= MAX_DEATHS:
            self._fail(opened, error)
        else:
            self._send_again(opened, error, without)

    def die(self, error: EngineDeadError) -> None:
        """Nothing can be sent any more."""
        if self._error is None:
            self._error = error
            self._open.clear()
            self._owner.on_death(error)

    # -- requests --------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        if self._error is not None:
            raise self._error
        if self._hasher is None or self._router is None:
            raise EngineDeadError("the fleet is not started")
        params = request.params
        most = MAX_INT if params.max_tokens is None else params.max_tokens
        ask = Ask(
            request_id=request.request_id,
            num_tokens=request.prompt_len,
            num_outputs=params.n * most,
            hashes=self._hasher.hashes(request),
            tenant=request.tenant or request.cache_salt,
        )
        sent = self._send(request, ask)
        if sent is None:
            raise EngineDeadError("no engine of the fleet takes requests; try again later")
        self._open[ask.request_id] = _Open(request, ask, *sent, params.n)

    def _send(
        self, request: Request, ask: Ask, without: Collection[int] = ()
    ) -> tuple[int, Link] | None:
        """Returns the engine that has got it; None if there is none but `without`."""
        assert self._router is not None
        gone = {self._names[engine] for engine in without if engine in self._names}
        engines = {name: engine for engine, name in self._names.items()}
        while True:
            choice = self._router.route(ask, gone)
            if choice is None:
                return None
            engine = engines[choice.name]
            link = self._links[engine]
            try:
                link.add(request)
            except EngineDeadError:  # which its client is about to be told
                gone.add(choice.name)
                continue
            return engine, link

    def _send_again(self, opened: _Open, error: OctavoError, without: Collection[int] = ()) -> None:
        sent = self._send(opened.request, opened.ask, without)
        if sent is None:
            self._fail(opened, error)
        else:
            opened.engine, opened.link = sent

    def _fail(self, opened: _Open, error: OctavoError) -> None:
        self._end(opened.request.request_id)
        self._owner.on_failed(opened.request.request_id, error)

    def _end(self, request_id: str) -> None:
        assert self._router is not None
        self._router.end(request_id)
        self._open.pop(request_id, None)
        self._refusals.pop(request_id, None)

    def on_refused(self, engine: int, request_id: str, error: OctavoError) -> None:
        """An engine's queue is full: the others may have room."""
        opened = self._open.get(request_id)
        if opened is None:
            return
        full = self._refusals.setdefault(request_id, set())
        full.add(engine)
        if opened.is_aborted or not isinstance(error, OverloadedError):
            self._fail(opened, error)
        else:
            self._send_again(opened, error, full)

    def on_deltas(self, message: Deltas) -> None:
        assert self._router is not None
        for delta in message.deltas:
            opened = self._open.get(delta.request_id)
            if opened is None:
                continue
            if not opened.has_begun:
                opened.has_begun = True
                self._router.begun(delta.request_id)
            if delta.finish_reason is not None:
                opened.num_running -= 1
                if not opened.num_running:
                    self._end(delta.request_id)
        self._owner.on_deltas(message)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Nothing to do if it has ended."""
        opened = self._open.get(request_id)
        if opened is None:
            return
        opened.is_aborted = opened.is_aborted or index is None
        opened.link.abort(request_id, index)

    # -- questions -------------------------------------------------------------------------------

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        """Returns the sum, and each engine's beside it."""
        links = dict(self._links)
        size = max(links, default=-1) + 1 if self._is_lasting else self._size
        found: list[EngineStats | None] = [None] * size
        told = await asyncio.gather(
            *(link.stats(is_detailed) for link in links.values()), return_exceptions=True
        )
        for engine, stats in zip(links, told, strict=True):
            if isinstance(stats, EngineStats):
                found[engine] = stats
            elif not isinstance(stats, EngineDeadError):
                raise stats
        if self._error is not None:
            raise self._error
        return replace(total_stats([one for one in found if one]), engines=tuple(found))

    async def reset_prefix_cache(self) -> bool:
        """Returns False if any engine could not."""
        links = list(self._links.values())
        return all(await asyncio.gather(*(link.reset_prefix_cache() for link in links)))

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        """Returns what the engine says that holds most of the prompt."""
        links = list(self._links.values())
        told = await asyncio.gather(
            *(link.explain_prefix(request) for link in links), return_exceptions=True
        )
        found = [one for one in told if isinstance(one, PrefixExplanation)]
        if not found:
            raise self._error or EngineDeadError("no engine of the fleet answers; try again later")
        return max(found, key=lambda one: (one.num_cached, one.num_shared))
