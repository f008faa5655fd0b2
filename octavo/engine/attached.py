"""A front end that joins the engine process of another: `AttachedClient`.

Used by the processes of `octavo serve --api-processes N`, whose parent has the engine process and
tells of its end. Never starts or ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from octavo.config import EngineConfig
from octavo.engine.client import Client
from octavo.engine.ipc import Died, FromEngine, Held, Ready
from octavo.engine.link import EngineLink, LinkOwner
from octavo.errors import EngineDeadError
from octavo.kv_cache.planner import MemoryPlan
from octavo.weights.hub import ModelFiles


class Attached(Client, Protocol):
    """A client of one engine or of a fleet, to be told by the owner of their processes."""

    def bind(self, engine: int, addresses: tuple[str, str]) -> None:
        """Binds the sockets to an engine, which is started when all fronts have."""
        ...

    def die(self, error: EngineDeadError, engine: int | None = None) -> None:
        """An engine process has ended; None: all have."""
        ...


class AttachedClient:
    """The link of front end number `front`; made in its event loop."""

    def __init__(
        self, owner: LinkOwner, front: int, on_held: Callable[[Held], None] | None = None
    ) -> None:
        """`on_held` is told what an engine of a fleet holds."""
        self.link = EngineLink(owner, front, self._on_message)
        self._on_held = on_held
        self._ready: asyncio.Future[MemoryPlan] = asyncio.get_running_loop().create_future()

    def bind(self, engine: int, addresses: tuple[str, str]) -> None:
        """Binds the sockets; the engine process is started when all fronts have."""
        self.link.bind(*addresses)

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Waits for the engine; returns its memory plan. Raises EngineDeadError."""
        return await asyncio.shield(self._ready)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Ready(plan):
                if not self._ready.done():
                    self._ready.set_result(plan)
            case Held() if self._on_held is not None:
                self._on_held(message)
            case Died(_, text):
                self.die(EngineDeadError(f"the engine process ended: {text}"))

    def die(self, error: EngineDeadError, engine: int | None = None) -> None:
        """The engine process has ended, says its owner or the process itself."""
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # whoever waits is told, and perhaps nobody does
        self.link.die(error)

    def begin_drain(self) -> None:
        """The owner watches the engine."""

    def kill(self) -> None:
        """The owner does so."""

    async def close(self) -> None:
        self.link.close()
