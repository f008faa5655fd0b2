"""Lines to a descriptor without ever waiting for whoever reads it.

Made by `observe.logs`, and for files by `observe.file_writer`. A thread writes what a queue holds;
when nobody reads, the queue fills, and further lines are dropped and counted. Never formats a line
of its own but the one that tells so.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

MAX_LINES = 10_000
"""What may wait; a line more is dropped."""
PAUSE_SECONDS = 0.01
"""After lines are written: to wake up for each would take the interpreter from those who make them,
thousands of times a second."""
_BATCH_BYTES = 4096
"""Written at once: what a pipe takes whole, so that two processes do not mix within a line."""


class LogWriter:
    """Safe in any thread and in signal handlers."""

    def __init__(self, descriptor: int, tell_dropped: Callable[[int], str]) -> None:
        """`tell_dropped` makes a text of the number of lines that were lost."""
        self._descriptor = descriptor
        self._tell_dropped = tell_dropped
        self._queue: SimpleQueue[Any] = SimpleQueue()
        """Of lines, of events that tell how far it is, and None for the end."""
        self.num_dropped = 0
        self._num_told = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, text: str) -> None:
        """Has `text` written, line end included, or drops it."""
        if self._queue.qsize() >= MAX_LINES:
            self.num_dropped += 1
        else:
            self._queue.put(text)

    def flush(self, seconds: float) -> None:
        """Waits until all that was put is written, but no longer."""
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait(seconds)

    def close(self, seconds: float) -> None:
        """Flushes, and lets the thread end."""
        self.flush(seconds)
        self._queue.put(None)

    def _run(self) -> None:
        batch, num_lines = b"", 0
        while (item := self._queue.get()) is not None:
            is_line = not isinstance(item, threading.Event)
            if is_line:
                data = self._text(item).encode("utf-8", "backslashreplace")
                if batch and len(batch) + len(data) > _BATCH_BYTES:
                    self._write(batch, num_lines)
                    batch, num_lines = b"", 0
                batch += data
                num_lines += 1
            if not is_line or self._queue.empty():
                self._write(batch, num_lines)
                batch, num_lines = b"", 0
                self._tell()
            if not is_line:
                item.set()
            elif not num_lines:
                time.sleep(PAUSE_SECONDS)

    def _text(self, item: Any) -> str:
        return item

    def _tell(self) -> None:
        """Says how many lines are missing, where they are missing."""
        if (lost := self.num_dropped - self._num_told) > 0:
            self._num_told += lost
            self._write(self._tell_dropped(lost).encode(), 0)

    def _write(self, data: bytes, num_lines: int) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError:  # nobody will ever read it
                self.num_dropped += num_lines
                self._num_told += num_lines
                return
