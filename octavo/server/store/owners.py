"""Who of several processes is alive: each holds the lock of a file, which ends with it however it
ends.

Used by what processes share in a store. Neither clocks nor process ids are asked: a lock is gone
with its process, at once, and two containers on one host see the same locks.
"""

from __future__ import annotations

import secrets
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Owner:
    """This process, as the others see it. `close` is to be called; the end of the process does the
    same."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the store's. Raises OSError."""
        self.name = secrets.token_hex(16)
        self._folder = folder / "owners"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self._folder / self.name
        new = folder / f"owner-{self.name}"
        self._file = new.open("wb")
        _lock(self._file.fileno())
        new.rename(self._path)  # Locked before anybody sees it.

    def is_alive(self, name: str) -> bool:
        """Whether the process of that name still runs."""
        if name == self.name:
            return True
        path = self._folder / name
        try:
            with path.open("r+b") as file:
                if not _lock(file.fileno()):
                    return True
        except FileNotFoundError:
            return False
        with suppress(OSError):
            path.unlink()
        return False

    def remove_dead(self) -> None:
        """Removes the files of those that have ended."""
        for path in self._folder.iterdir():
            self.is_alive(path.name)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def _lock(descriptor: int) -> bool:
    """Returns whether the lock was free, and is held now."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
