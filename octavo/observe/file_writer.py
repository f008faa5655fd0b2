"""Lines to the end of a file that several processes may write, and that others may move away.

Made by whoever keeps a log of its own (`server.audit`). Every line is one write in append mode, so
that lines of two processes do not mix; a file that is not at its path any more is left, and one is
made there. Lines that cannot be written are counted, and told of once one can.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError
from octavo.observe.log_writer import MAX_LINES, LogWriter

logger = logging.getLogger(__name__)

MODE = 0o600
"""Of a file that is made: who asked for what is not everybody's."""
COMPLAIN_SECONDS = 60.0
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
"""Not to wait: of files that changes nothing, and a pipe may have come in between."""


@dataclass(frozen=True, slots=True)
class _Later:
    make: Callable[[], str]
    num_bytes: int


class FileWriter(LogWriter):
    """Lines come from one thread; another one makes their texts, and writes them."""

    def __init__(self, path: str, tell_dropped: Callable[[int], str], max_bytes: int) -> None:
        """`max_bytes` may wait. Raises OSError if the file cannot be opened."""
        self._path = path
        self._max_bytes = max_bytes
        self._bytes_put = self._bytes_done = 0
        """Each is changed by one thread alone."""
        self.num_taken = 0
        self._is_cut = False
        self._complained_at = -COMPLAIN_SECONDS
        super().__init__(_opened(path), tell_dropped)

    def put_later(self, make: Callable[[], str], num_bytes: int) -> None:
        """Has the text that `make` returns written, of about so many bytes, or drops it."""
        num_waiting = self._bytes_put - self._bytes_done
        if self._queue.qsize() >= MAX_LINES or num_waiting + num_bytes > self._max_bytes:
            self.num_dropped += 1
            return
        self.num_taken += 1
        self._bytes_put += num_bytes
        self._queue.put(_Later(make, num_bytes))

    def _text(self, item: Any) -> str:
        self._bytes_done += item.num_bytes
        try:
            return item.make()
        except Exception as error:  # the edge of the thread: the lines behind this one are written
            logger.error("a line of %s cannot be made", self._path, exc_info=error)
            self.num_dropped += 1
            return ""

    def _tell(self) -> None:
        lost = self.num_dropped - self._num_told
        if lost > 0 and self._written(self._tell_dropped(lost).encode()):
            self._num_told += lost

    def _write(self, data: bytes, num_lines: int) -> None:
        if data and not self._written(data):
            self.num_dropped += num_lines

    def _written(self, data: bytes) -> bool:
        """Writes data; returns whether all of it was."""
        try:
            self._follow()
            # What was cut off would make the next line one with it.
            data = b"\n" + data if self._is_cut else data
            done = os.write(self._descriptor, data)
            self._is_cut = done < len(data)
            while self._is_cut:
                data = data[done:]
                done = os.write(self._descriptor, data)
                self._is_cut = done < len(data)
        except OSError as error:
            now = time.monotonic()
            if now - self._complained_at >= COMPLAIN_SECONDS:
                self._complained_at = now
                logger.error("%s cannot be written, lines are lost: %s", self._path, error.strerror)
            return False
        return True

    def _follow(self) -> None:
        """Opens the path again if the file there is not ours any more."""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        ours = os.fstat(self._descriptor)
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            opened = _opened(self._path)
            os.close(self._descriptor)
            self._descriptor, self._is_cut = opened, False

    def _run(self) -> None:
        super()._run()
        os.close(self._descriptor)


def check_file(path: str, field: str) -> None:
    """Raises ConfigError if lines cannot be added to a file."""
    try:
        os.close(_opened(path))
    except OSError as error:
        message = f"{field} {path} cannot be written ({error.strerror}); give another path"
        raise ConfigError(message, field=field) from error


def _opened(path: str) -> int:
    """Returns a descriptor. Raises OSError, also where there is something else than a file: whoever
    opens a pipe waits for its reader, and lines of a device cannot be read again."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
    return os.open(path, _FLAGS, MODE)
