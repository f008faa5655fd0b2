"""A fleet that is stepped like a core: for LLM, which has no event loop.

Made by LLM where data_parallel_size is above 1. The fleet lives in an event loop of a thread of its
own; what its engines tell waits here for the next `step`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from octavo.config import EngineConfig
from octavo.engine.fleet import Fleet
from octavo.engine.ipc import Deltas
from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import Request, TokenDelta
from octavo.weights.hub import ModelFiles

T = TypeVar("T")


class Core(Protocol):
    """What LLM asks of its engine or engines."""

    plan: MemoryPlan

    def add(self, request: Request) -> None:
        """Queues a request. Raises OverloadedError."""
        ...

    def step(self) -> list[TokenDelta]: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def stats(self, is_detailed: bool = False) -> EngineStats: ...

    def reset_prefix_cache(self) -> bool: ...

    def close(self) -> None: ...


class FleetCore:
    """Requests in, token deltas out, of all engines. One thread calls it."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        """Starts the engines; returns when all take requests. Raises OctavoError."""
        self._news: SimpleQueue[list[TokenDelta] | OctavoError] = SimpleQueue()
        self._running: dict[str, int] = {}
        """Sequences of each request that are not finished."""
        self._most = config.max_num_queued_requests
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="octavo-fleet", daemon=True
        )
        self._thread.start()
        self._fleet = Fleet(self, config)
        try:
            self.plan = self._wait(self._fleet.start(config, files, "text", "warning"))
        except BaseException:
            self._end_thread()
            raise

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def add(self, request: Request) -> None:
        """Sends a request. Raises OverloadedError while as many are open as one engine queues."""
        if len(self._running) >= self._most:
            raise OverloadedError(f"{self._most} requests are open already")
        self._running[request.request_id] = request.params.n
        self._loop.call_soon_threadsafe(self._send, request)

    def _send(self, request: Request) -> None:
        try:
            self._fleet.link.add(request)
        except OctavoError as error:
            self._news.put(error)

    def step(self) -> list[TokenDelta]:
        """Waits for news; returns all there are. Raises what ended a request or the fleet."""
        found: list[TokenDelta] = []
        news = self._news.get() if self._running else []
        while True:
            if isinstance(news, OctavoError):
                raise news
            found += news
            try:
                news = self._news.get_nowait()
            except Empty:
                break
        for delta in found:
            if delta.finish_reason is not None:
                self._finish(delta.request_id)
        return found

    def _finish(self, request_id: str) -> None:
        left = self._running.get(request_id, 0) - 1
        if left > 0:
            self._running[request_id] = left
        else:
            self._running.pop(request_id, None)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._loop.call_soon_threadsafe(self._fleet.link.abort, request_id, index)

    def stats(self, is_detailed: bool = False) -> EngineStats:
        return self._wait(self._fleet.link.stats(is_detailed))

    def reset_prefix_cache(self) -> bool:
        return self._wait(self._fleet.link.reset_prefix_cache())

    def close(self) -> None:
        """Ends the engines. May be called twice."""
        if not self._loop.is_closed():
            self._wait(self._fleet.close())
            self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- news, in the thread of the fleet --------------------------------------------------------

    def on_deltas(self, message: Deltas) -> None:
        self._news.put(message.deltas)

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        self._news.put(error)

    def on_death(self, error: EngineDeadError) -> None:
        self._news.put(error)
