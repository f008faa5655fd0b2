"""The contents of stored files: one file of the disk each, named by the id of its object.

Made by `Store`; used by whoever writes or reads contents. A content is whole under its name or not
there: it is written under another one (`.part`) and renamed. Never knows tenants: who has no right
to an object does not learn its id.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from octavo.errors import OverloadedError
from octavo.server.store.failures import explained

T = TypeVar("T")

MAX_DRAFTS = 32
"""Contents that one process writes at once: each holds some memory."""
STALE_SECONDS = 3600.0
"""A file that belongs to no object and was not written to for so long is removed."""
_PART = ".part"


class Contents:
    """The folder `files` of a store."""

    def __init__(self, folder: Path) -> None:
        self._store = folder
        self._folder = folder / "files"
        self._num_drafts = 0

    def path(self, id: str) -> Path:
        return self._folder / id

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns, which reads or writes files, called in a thread. Raises
        ApiError: 503 if the folder cannot be used, 507 if the disk is full."""

        def explained_work() -> T:
            with explained(self._store):
                return work()

        return await asyncio.to_thread(explained_work)

    async def begin(self, id: str) -> Draft:
        """Returns a new content, to be written; `close` is to be called whatever happens. Raises
        OverloadedError, ApiError."""
        if self._num_drafts >= MAX_DRAFTS:
            raise OverloadedError(f"{MAX_DRAFTS} files are being written already; try again later")
        self._num_drafts += 1
        draft = Draft(self, id)
        try:
            await self.in_thread(draft.open)
        except BaseException:
            self.ended()
            raise
        return draft

    def ended(self) -> None:
        self._num_drafts -= 1

    async def remove(self, id: str) -> None:
        """Removes a content, if it is there."""
        await self.in_thread(lambda: self.path(id).unlink(missing_ok=True))

    def old_names(self) -> list[str]:
        """Returns the names of files that nobody writes to any more. To be called in a thread."""
        if not self._folder.is_dir():
            return []
        before = time.time() - STALE_SECONDS
        return [one.name for one in self._folder.iterdir() if one.stat().st_mtime < before]


class Draft:
    """A content that is being written. Its methods wait for the disk in threads."""

    def __init__(self, contents: Contents, id: str) -> None:
        self._contents = contents
        self._path = contents.path(id)
        self._part = self._path.with_name(id + _PART)
        self.num_bytes = 0

    def open(self) -> None:
        self._part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._part.open("wb")

    async def write(self, pieces: Collection[bytes]) -> None:
        """Adds to the content. Raises ApiError."""
        await self._contents.in_thread(lambda: self._file.writelines(pieces))
        self.num_bytes += sum(map(len, pieces))

    async def finish(self) -> None:
        """Puts the content in its place: whole, also after a power cut. Raises ApiError."""
        await self._contents.in_thread(self._finish)

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._part.rename(self._path)

    async def close(self) -> None:
        """Lets go of the file; of a content that is not finished nothing is left."""
        self._contents.ended()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # What was not written yet is not wanted any more.
        finally:
            self._part.unlink(missing_ok=True)
