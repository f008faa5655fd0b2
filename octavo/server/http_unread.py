"""The time in which a client must read some of what waits for it; even a closed connection waits.

One of each connection, owned by `http_protocol`, which says when there is something to look at.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable

if sys.platform == "linux":
    import fcntl
    import termios

logger = logging.getLogger(__name__)


class UnreadWatch:
    """Cuts a connection off whose client takes nothing for a time. At most one timer runs, none
    while nothing waits."""

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        is_writing: Callable[[], bool],
    ) -> None:
        """`is_writing` says whether an answer is under way that the client takes as it comes."""
        self._transport = transport
        self._loop = loop
        self._seconds = seconds
        self._is_writing = is_writing
        self._timer: asyncio.TimerHandle | None = None
        self._num_waiting = 0
        """Bytes that waited to be read when the timer was armed."""

    def look(self) -> None:
        """Begins the time if something waits."""
        if self._timer is not None:
            self._num_waiting = sys.maxsize  # More has been written since: it was read before.
        elif self._transport.get_write_buffer_size():
            self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._num_waiting = self._num_unread()
        self._timer = self._loop.call_later(self._seconds, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if not self._transport.get_write_buffer_size():
            return
        if self._num_unread() < self._num_waiting or self._is_writing():
            self._arm()
            return
        logger.info("a connection ends: the client does not read its answer")
        self._transport.abort()

    def _num_unread(self) -> int:
        """Returns what waits here and in the kernel, which takes more in large steps only: of a
        slow reader's progress, its own buffer alone would tell nothing for minutes."""
        num_bytes = self._transport.get_write_buffer_size()
        if sys.platform == "linux":
            sock = self._transport.get_extra_info("socket")
            in_kernel = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
            num_bytes += int.from_bytes(in_kernel, sys.byteorder)
        return num_bytes
