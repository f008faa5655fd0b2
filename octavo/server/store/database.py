"""One SQLite file, and the thread of this process that speaks to it.

Used by `store`; all front processes of a server have one each on the same file, in which SQLite's
write-ahead log lets one write while others read. Whatever goes wrong with file or disk becomes an
answer that says the way out. Never knows what is stored.

A transaction is whole or not there, also after kill -9. After a power cut the last seconds may be
missing (the log is not forced to the disk at each commit), but nothing is half there.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import fcntl

from octavo.errors import OverloadedError
from octavo.server.errors import ApiError
from octavo.server.store import schema
from octavo.server.store.failures import disk_full, explained, unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

FILE = "store.sqlite"
MAX_WAITING = 256
"""Calls that may wait for the thread."""
BUSY_SECONDS = 5.0
"""How long a write waits for those of other processes."""
RETRY_SECONDS = 5.0
"""Between two tries to open what could not be opened."""
_FREED_PAGES = 64
"""Given back to the disk after a transaction, at most."""


class Database:
    """The file `store.sqlite` of a folder. Made in any thread; called by one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None
        self._num_waiting = 0
        self._error: ApiError | None = None
        self._tried_at = 0.0

    async def run(self, work: Work[T]) -> T:
        """Returns what `work` returns, called in the thread, within one transaction: all that it
        writes is there afterwards, or nothing if it raises.

        Raises what `work` raises; ApiError: 503 if the store cannot be used, 507 if the disk is
        full; OverloadedError if too many wait already.
        """
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(
                f"{self._num_waiting} calls wait for the store already; try again later"
            )
        self._num_waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)
        future.add_done_callback(self._ended)
        # Whoever leaves does not undo what is done meanwhile.
        return await asyncio.shield(future)

    def _ended(self, future: asyncio.Future[T]) -> None:
        self._num_waiting -= 1
        if not future.cancelled():
            future.exception()  # nobody may be left who asks

    async def close(self) -> None:
        """Waits for what runs, and lets the file go. May be called twice."""
        with suppress(RuntimeError):  # closed already
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    def _transact(self, work: Work[T]) -> T:
        with self._explained():
            connection = self._connected()
            # At once for writing: a read that becomes a write could fail half-way.
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute(f"PRAGMA incremental_vacuum({_FREED_PAGES})")
            return result
        raise AssertionError("unreachable")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what goes wrong with file and disk into answers."""
        try:
            with explained(self.folder):
                yield
        except sqlite3.Error as error:
            code = vars(error).get("sqlite_errorcode", 0) & 0xFF  # none if not from SQLite
            if code == sqlite3.SQLITE_FULL:
                raise disk_full(self.folder) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                message = "the store is busy with what others write; try again later"
                raise OverloadedError(message) from error
            if isinstance(error, sqlite3.IntegrityError | sqlite3.InterfaceError):
                raise  # a mistake of ours
            self._disconnect()  # The next call opens the file again.
            raise unavailable(self.folder, str(error)) from error

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._error is not None and time.monotonic() - self._tried_at < RETRY_SECONDS:
                raise self._error
            try:
                with self._explained():
                    self._connection = self._connect()
            except ApiError as error:
                self._error, self._tried_at = error, time.monotonic()
                raise
            self._error = None
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        # What clients leave is nobody else's to read.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self.folder / FILE,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            # One process at a time makes the tables.
            with open(self.folder / "lock", "ab") as lock:
                if sys.platform != "win32":
                    fcntl.flock(lock, fcntl.LOCK_EX)
                schema.prepare(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")  # It can be written.
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()
