"""The life of one batch: its lines are checked, run, and written out.

Made by `runner` for a batch that this process has claimed. Each step is in the store before the
next begins, so that whoever claims the batch later goes on from there:

    validating    all lines are read once; what is wrong with one is its result
    in_progress   lines without a result are run, and each result is kept as it comes
    finalizing    results become files, and with the batch's end they are kept there alone
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from octavo.errors import OverloadedError, RequestError
from octavo.observe.collectors import BatchCounts
from octavo.server.batches import outputs, records
from octavo.server.batches.calls import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, LineCalls
from octavo.server.batches.lines import MAX_BESIDES_BYTES, MAX_LINES, Line, LineReader, Repetitions
from octavo.server.batches.records import Batch, BatchError, LineResult
from octavo.server.batches.slots import Slots
from octavo.server.errors import ApiError
from octavo.server.state import ServerState
from octavo.server.store.owners import Owner

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the workers of one process have in common."""

    calls: LineCalls
    slots: Slots
    counts: BatchCounts


class Worker:
    """Works on one batch."""

    def __init__(
        self, state: ServerState, owner: Owner, shared: Shared, tenant: str, id: str
    ) -> None:
        self.tenant = tenant
        self.id = id
        self._state = state
        self._store = state.store
        self._owner = owner
        self._calls = shared.calls
        self._slots = shared.slots
        self._counts = shared.counts
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Has the batch end with what is done by now: it is cancelled, or its time is over."""
        self._stopped.set()

    async def run(self) -> None:
        """Returns when the batch is over. Raises EngineDeadError, LostError: others go on."""
        batch, is_late = await self._changed(), False
        while batch.status in (records.VALIDATING, records.IN_PROGRESS) and not is_late:
            step = self._validate if batch.status == records.VALIDATING else self._run_lines
            is_late = batch.expires_at <= self._store.clock()
            is_late = is_late or not await self._until_stopped(step(batch))
            batch = await self._changed()
        if batch.status in records.ENDS:
            return
        if is_late:
            now = int(self._store.clock())
            late = {"status": records.FINALIZING, "finalizing_at": now, "expired_at": now}
            batch = await self._changed(**late)
        if batch.status == records.CANCELLING:
            await self._end(batch, "cancelled")
        elif batch.expired_at is not None:
            await self._refuse_the_rest(batch)
            await self._end(batch, "expired")
        else:
            await self._end(batch, "completed")

    async def fail(self, error: BatchError) -> None:
        """Ends the batch without results. Raises LostError."""
        now = self._store.clock()
        ended = {"status": "failed", "failed_at": int(now), "errors": [error]}
        await self._patiently(
            lambda: self._store.run(
                lambda db: records.end(db, self._owner, self.tenant, self.id, now, (), **ended)
            )
        )
        self._counts.ended["failed"] += 1
        logger.info("%s failed: %s", self.id, error.message)

    async def _until_stopped(self, step: Awaitable[None]) -> bool:
        """Returns whether a step came to its end before `stop` was called."""
        work = asyncio.ensure_future(step)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return work.done()
        finally:
            for one in (work, stopped):
                one.cancel()
            await asyncio.wait({work, stopped})
            if not work.cancelled():
                work.exception()  # Nobody asks for it any more.

    async def _changed(self, **fields: object) -> Batch:
        """Changes fields of the batch, unless it is cancelled meanwhile; returns it as it is."""
        now = self._store.clock()

        def change(db: sqlite3.Connection) -> Batch:
            records.check_owner(db, self._owner, self.id)
            batch = records.change(db, self.tenant, self.id, now)
            if batch.status == records.CANCELLING or not fields:
                return batch
            return records.change(db, self.tenant, self.id, now, **fields)

        return await self._patiently(lambda: self._store.run(change))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Returns what `work` returns, which is called again while the store has no room or cannot
        be used: nothing is lost by waiting."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await work()
            except OverloadedError:
                pass
            except ApiError as error:
                if error.code not in ("store_full", "store_unavailable"):
                    raise
                if pause == FIRST_PAUSE_SECONDS:
                    logger.warning("%s waits: %s", self.id, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    # -- lines -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _reader(self, batch: Batch) -> AsyncGenerator[LineReader, None]:
        path = self._store.contents.path(batch.input_file_id)
        limit = self._state.body_room.max_body_bytes + MAX_BESIDES_BYTES
        reader = await asyncio.to_thread(LineReader, path, (batch.endpoint,), limit)
        try:
            yield reader
        finally:
            reader.close()

    async def _validate(self, batch: Batch) -> None:
        """Reads all lines; keeps what is wrong with them."""
        repetitions, total = Repetitions(), 0
        async with self._reader(batch) as reader:
            while (lines := await asyncio.to_thread(reader.next)) is not None:
                total += len(lines)
                if total > MAX_LINES:
                    message = f"the input file has more than {MAX_LINES} lines; make several"
                    raise RequestError(message, code="too_many_lines", param="input_file_id")
                wrong = [line for line in repetitions.checked(lines) if line.error is not None]
                await self._keep([outputs.refused(batch.id, *_wrong(line)) for line in wrong])
        if not total:
            raise RequestError("the input file has no lines", code="empty_file")
        now = int(self._store.clock())
        await self._changed(status=records.IN_PROGRESS, in_progress_at=now, total=total)

    async def _run_lines(self, batch: Batch) -> None:
        """Runs all lines that have no result, as many at once as there are slots."""
        done = await self._patiently(
            lambda: self._store.run(lambda db: records.lines_done(db, batch.id))
        )
        async with self._reader(batch) as reader, asyncio.TaskGroup() as running:
            while (lines := await asyncio.to_thread(reader.next, done)) is not None:
                for line in lines:
                    await self._slots.take(len(line.body))
                    task = running.create_task(self._run_line(batch, line))
                    # Also of a task that is cancelled before it has begun.
                    task.add_done_callback(partial(self._give_back, len(line.body)))
        await self._changed(status=records.FINALIZING, finalizing_at=int(self._store.clock()))

    def _give_back(self, num_bytes: int, _: asyncio.Task[None]) -> None:
        self._slots.give_back(num_bytes)

    async def _run_line(self, batch: Batch, line: Line) -> None:
        answer = await self._calls.run_patiently(
            self.tenant, line.url, line.body, outputs.request_id(batch.id, line.number)
        )
        await self._keep([outputs.answered(batch.id, line, answer)])

    async def _keep(self, results: Collection[LineResult]) -> None:
        if not results:
            return
        store = self._store
        await self._patiently(
            lambda: store.run(
                lambda db: records.record(
                    db, store.bounds, self._owner, self.tenant, self.id, results
                )
            )
        )
        for result in results:
            self._counts.lines["failed" if result.is_error else "completed"] += 1

    async def _refuse_the_rest(self, batch: Batch) -> None:
        """Gives all lines without a result the one that their time is over."""
        message = f"not run within the completion window, {batch.completion_window}"
        error = RequestError(message, code="batch_expired")
        done = await self._patiently(
            lambda: self._store.run(lambda db: records.lines_done(db, batch.id))
        )
        async with self._reader(batch) as reader:
            while (lines := await asyncio.to_thread(reader.next, done)) is not None:
                await self._keep([outputs.refused(batch.id, line, error) for line in lines])

    # -- the end -----------------------------------------------------------------------------

    async def _end(self, batch: Batch, outcome: str) -> None:
        store = self._store
        written = await self._patiently(lambda: outputs.write_files(store, batch))
        now = store.clock()
        ids = {file.id.rpartition("-")[2]: file.id for file in written}
        ended = {
            "status": outcome,
            f"{outcome}_at": int(now),
            "output_file_id": ids.get("output"),
            "error_file_id": ids.get("errors"),
        }
        over = await self._patiently(
            lambda: store.run(
                lambda db: records.end(db, self._owner, self.tenant, self.id, now, written, **ended)
            )
        )
        self._counts.ended[over.status] += 1
        seconds = int(now) - batch.created_at
        message = "%s %s after %d s: %d of %d lines done, %d failed"
        logger.info(message, self.id, over.status, seconds, over.completed, over.total, over.failed)


def _wrong(line: Line) -> tuple[Line, RequestError]:
    assert line.error is not None
    return line, line.error
