"""Several engine processes behind one front end: `--data-parallel-size N`.

`Fleet` owns them: starts all, starts one again that has died, and ends all. `AttachedFleet` is the
same to a front process whose parent owns them. Which request goes where is the `fleet_link`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from octavo.config import EngineConfig
from octavo.engine.attached import AttachedClient
from octavo.engine.client import EngineClient
from octavo.engine.fleet_link import FleetLink, MemberOwner
from octavo.engine.link import EngineLink, LinkOwner
from octavo.engine.prefixes import RequestHasher
from octavo.errors import ConfigError, EngineDeadError, OctavoError
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_events_config import of_rank
from octavo.weights.hub import ModelFiles

logger = logging.getLogger(__name__)

MAX_ENGINES = 64
"""Of a host: beyond what any has GPUs for, so that a slip of the finger does not fill a machine
without one with processes."""
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 60.0
"""Before an engine that has died is started again: doubled each time that it does not come up."""


class Member(Protocol):
    """One engine of a fleet, as `EngineClient` and `AttachedClient` are."""

    link: EngineLink

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan: ...

    async def close(self) -> None: ...


MakeClient = Callable[[MemberOwner, int], EngineClient]
"""Makes the client of an engine, by number."""


def least_plan(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Returns what every engine can do: they may have found different memory."""
    return replace(plans[0], max_model_len=min(plan.max_model_len for plan in plans))


class Fleet:
    """The engine processes of this process, and the link of front end 0 to them."""

    def __init__(
        self,
        owner: LinkOwner,
        config: EngineConfig,
        make: MakeClient | None = None,
        on_leave: Callable[[int, EngineDeadError], None] | None = None,
    ) -> None:
        """`make` says how an engine is started; `on_leave` is told of one that has died. Raises
        ConfigError for more engines than MAX_ENGINES."""
        size = config.data_parallel_size
        if size > MAX_ENGINES:
            raise ConfigError(
                f"data_parallel_size {size} is more than the {MAX_ENGINES} engines that one host "
                "runs; give it at most so many, and start servers on other hosts behind a balancer",
                field="data_parallel_size",
            )
        self.link = FleetLink(owner, 0, size, self._restart_later)
        self._tp_size = config.tensor_parallel_size
        self._make = make or self._own_client
        self._tell_leave = on_leave
        self._owners = [MemberOwner(self.link, engine) for engine in range(size)]
        self._clients: dict[int, EngineClient] = {}
        self._restarts: dict[int, asyncio.Task[None]] = {}
        self._is_ending = False

    def _own_client(self, owner: MemberOwner, engine: int) -> EngineClient:
        first = engine * self._tp_size
        return EngineClient(owner, first_device=first, on_held=owner.on_held)

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Returns the plan of each engine once all take requests. Raises what the first raised that
        could not."""
        self._given = config, files, log_format, log_level
        for engine, owner in enumerate(self._owners):
            self._clients[engine] = self._make(owner, engine)
        starts = [
            asyncio.ensure_future(client.start(*self._given_to(engine)))
            for engine, client in self._clients.items()
        ]
        try:
            plans = list(await asyncio.gather(*starts))
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise
        plan = least_plan(plans)
        self.link.prepare(RequestHasher(config, files, plan))
        for engine, client in self._clients.items():
            self.link.join(engine, client.link, plans[engine])
        for client in self._clients.values():
            if client.link.error is not None:  # it died while others loaded
                raise client.link.error
        return plan

    def _given_to(self, engine: int) -> tuple[EngineConfig, ModelFiles, str, str]:
        """What one engine is started with: each publishes its events at a place of its own."""
        config, files, log_format, log_level = self._given
        if config.kv_events_config is not None:
            events = of_rank(config.kv_events_config, engine)
            config = replace(config, kv_events_config=events)
        return config, files, log_format, log_level

    # -- engines that die ------------------------------------------------------------------------

    def _restart_later(self, engine: int, error: EngineDeadError) -> None:
        if self._tell_leave is not None:
            self._tell_leave(engine, error)
        if not self._is_ending and len(self.link.engines):
            self._restarts[engine] = asyncio.create_task(self._restart(engine))

    async def _restart(self, engine: int) -> None:
        """Tries until it comes up or the fleet ends."""
        wait = FIRST_WAIT_SECONDS
        while not self._is_ending:
            logger.warning("engine %d is started again in %g s", engine, wait)
            await self._clients[engine].close()
            await asyncio.sleep(wait)
            self._clients[engine] = client = self._make(self._owners[engine], engine)
            try:
                plan = await client.start(*self._given_to(engine))
            except OctavoError as error:
                logger.error("engine %d does not start: %s", engine, error)
                wait = min(2 * wait, MAX_WAIT_SECONDS)
                continue
            self.link.join(engine, client.link, plan)
            logger.info("engine %d takes requests again", engine)
            return

    # -- the end ---------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """No engine is started again, and none is waited for as long."""
        self._is_ending = True
        for client in self._clients.values():
            client.begin_drain()

    def kill(self) -> None:
        self._is_ending = True
        for client in self._clients.values():
            client.kill()

    async def close(self) -> None:
        """Ends all processes. May be called twice."""
        self._is_ending = True
        for task in self._restarts.values():
            task.cancel()
        await asyncio.gather(*self._restarts.values(), return_exceptions=True)
        self._restarts.clear()
        self.link.die(EngineDeadError("the fleet is closed"))
        await asyncio.gather(*(client.close() for client in self._clients.values()))


class AttachedFleet:
    """The links of front process `front` to the engines of its parent."""

    def __init__(self, owner: LinkOwner, front: int, size: int) -> None:
        self.link = FleetLink(owner, front, size)
        self._owners = [MemberOwner(self.link, engine) for engine in range(size)]
        self._clients = {engine: self._attached(engine) for engine in range(size)}
        self._bound: set[int] = set()
        self._joining: set[asyncio.Task[None]] = set()

    def _attached(self, engine: int) -> AttachedClient:
        owner = self._owners[engine]
        return AttachedClient(owner, self.link.front, owner.on_held)

    def bind(self, engine: int, addresses: tuple[str, str]) -> None:
        """Binds the sockets to an engine that is about to start, perhaps again."""
        if engine in self._bound:
            self._clients[engine].link.close()
            self._clients[engine] = self._attached(engine)
            joining = asyncio.create_task(self._join(engine))
            self._joining.add(joining)
            joining.add_done_callback(self._joining.discard)
        self._bound.add(engine)
        self._clients[engine].bind(engine, addresses)

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Waits for all engines. Raises EngineDeadError."""
        self._given = config, files, log_format, log_level
        clients = list(self._clients.values())
        plans = list(await asyncio.gather(*(client.start(*self._given) for client in clients)))
        plan = least_plan(plans)
        self.link.prepare(RequestHasher(config, files, plan))
        for engine, client in enumerate(clients):
            self.link.join(engine, client.link, plans[engine])
        return plan

    async def _join(self, engine: int) -> None:
        """An engine is started again: it is asked once it is there."""
        client = self._clients[engine]
        try:
            plan = await client.start(*self._given)
        except EngineDeadError:
            return  # which the parent tells, and tries again
        if self._clients[engine] is client:
            self.link.join(engine, client.link, plan)

    def die(self, error: EngineDeadError, engine: int | None = None) -> None:
        """An engine has died, says the parent; None: all have."""
        for number, client in self._clients.items():
            if engine in (None, number):
                client.die(error)
        if engine is None:
            self.link.die(error)

    def begin_drain(self) -> None:
        """The parent watches the engines."""

    def kill(self) -> None:
        """The parent does so."""

    async def close(self) -> None:
        for task in self._joining:
            task.cancel()
        for client in self._clients.values():
            await client.close()
