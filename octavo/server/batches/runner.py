"""Which batches this process works on, and what is removed because its time is over.

Started and closed by `serve`. Each front process of a server has one; a batch is worked on by one
of them at a time, and when that ends, however it does, another goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from octavo.errors import EngineDeadError, OctavoError, RequestError
from octavo.observe.collectors import BatchCounts
from octavo.server.batches import records
from octavo.server.batches.calls import LineCalls
from octavo.server.batches.records import BatchError, LostError
from octavo.server.batches.slots import Slots
from octavo.server.batches.worker import Shared, Worker
from octavo.server.state import ServerState
from octavo.server.store import files, objects
from octavo.server.store.owners import Owner

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at what the other processes have changed."""
SWEEP_SECONDS = 60.0
MAX_ACTIVE = 16
"""Batches that one process works on at once; their lines share its slots."""


class BatchRunner:
    """The batches of this process."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._store = state.store
        self._calls = LineCalls(state)
        self._slots = Slots(state)
        self._counts = BatchCounts()
        state.metrics.watch_batches(self._counts)
        self._owner: Owner | None = None
        self._active: dict[str, tuple[Worker, asyncio.Task[None]]] = {}
        self._swept_at = -SWEEP_SECONDS
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look for batches; to be called in the event loop."""
        if self._store.bounds.max_bytes:
            self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Gives back what is worked on: lines that run are run again by whoever goes on."""
        if self._task is None:
            return
        tasks = [self._task, *(task for _, task in self._active.values())]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if self._owner is not None:
            owner = self._owner
            with suppress(OctavoError):  # It can be claimed all the same once this has ended.
                await self._store.run(lambda db: records.release(db, owner))
            owner.close()

    async def _run(self) -> None:
        news = self._state.batch_news
        while True:
            try:
                await self._look()
            except OctavoError as error:
                logger.debug("no look at batches: %s", error)  # The store's check has warned.
            except Exception as error:
                # The edge: one mistake must not end the work on all batches.
                logger.error("a look at batches failed", exc_info=error)
            news.clear()
            # Not wait_for: that of Python 3.11 may lose a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await news.wait()

    async def _look(self) -> None:
        store, now = self._store, self._store.clock()
        if self._owner is None:
            self._owner = await self._new_owner()
        owner = self._owner
        stopped = await store.run(lambda db: records.to_stop(db, owner, now))
        self._counts.num_open = await store.run(records.num_open)
        for id in stopped & self._active.keys():
            self._active[id][0].stop()
        room = MAX_ACTIVE - len(self._active)
        if room and not self._state.drain.is_draining:
            knows, models = self._calls.knows, self._state.model_names
            claimed = await store.run(lambda db: records.claim(db, owner, knows, models, now, room))
            for tenant, id in claimed:
                self._begin(owner, tenant, id)
        if time.monotonic() - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            await self._sweep(owner)

    async def _new_owner(self) -> Owner:
        await self._store.run(lambda db: None)  # The folder is there from then on.
        return await self._store.contents.in_thread(lambda: Owner(self._store.folder))

    def _begin(self, owner: Owner, tenant: str, id: str) -> None:
        shared = Shared(self._calls, self._slots, self._counts)
        worker = Worker(self._state, owner, shared, tenant, id)
        task = asyncio.ensure_future(self._work(worker))
        self._active[id] = worker, task

    async def _work(self, worker: Worker) -> None:
        try:
            try:
                await worker.run()
            except* RequestError as group:
                error = _first(group)
                assert isinstance(error, RequestError)
                code = error.code or "invalid_value"
                await worker.fail(BatchError(code=code, message=str(error), param=error.param))
            except* (LostError, EngineDeadError) as group:
                logger.info("%s is left to others: %s", worker.id, _first(group))
            except* OSError as group:
                message = f"the input file cannot be read: {_first(group)}"
                await worker.fail(BatchError(code="unreadable_file", message=message))
            except* Exception as group:
                # The edge: a mistake of ours must not be tried again for ever.
                logger.error("%s ended with an internal error", worker.id, exc_info=group)
                message = "an internal error; the server's log has the details"
                await worker.fail(BatchError(code="internal_error", message=message))
        except* OctavoError as group:
            logger.info("%s is left to others: %s", worker.id, _first(group))
        finally:
            del self._active[worker.id]
            self._state.batch_news.set()  # There is room for another.

    async def _sweep(self, owner: Owner) -> None:
        """Removes what has expired, and files that belong to nothing any more."""
        store, now = self._store, self._store.clock()
        expired = await store.run(lambda db: objects.remove_expired(db, now))
        for id in expired:
            await store.contents.remove(id)
        await store.contents.in_thread(owner.remove_dead)
        old = await store.contents.in_thread(store.contents.old_names)
        if old:
            known = await store.run(lambda db: files.known(db, old))
            for name in old:
                if name not in known:
                    await store.contents.remove(name)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the first exception of a group that is none itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
