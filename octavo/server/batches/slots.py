"""How many lines of batches run at once: what interactive requests leave.

Made by `runner`, asked by all its workers before a line begins. Never runs anything.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from octavo.server.state import ServerState

LOOK_SECONDS = 0.1
"""Between two looks whether there is room again, if no line has ended meanwhile."""
MAX_BYTES = 64 * 2**20
"""Of all lines that run."""


class Slots:
    """Lines that run in this process. Batches get them in turn, one line each.

    An eighth of the sequences that the engine runs is always left to others, and half of those that
    may wait; with several front processes each has its part. Each interactive request that is open
    takes one more, down to one line.
    """

    def __init__(self, state: ServerState) -> None:
        engine = state.engine
        most = min(engine.max_num_seqs * 7 // 8, engine.max_num_queued_requests // 2)
        self._most = most // state.config.api_processes
        self._drain = state.drain
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self.num_used = 0
        self._num_bytes = 0

    async def take(self, num_bytes: int) -> None:
        """Waits until a line of so many bytes may begin; never while the server ends."""
        async with self._turn:
            while not self._has_room(num_bytes):
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._freed.wait()
            self.num_used += 1
            self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.num_used -= 1
        self._num_bytes -= num_bytes
        self._freed.set()

    def _has_room(self, num_bytes: int) -> bool:
        if self._drain.is_draining:
            return False
        if not self.num_used:
            return True
        fits = self._num_bytes + num_bytes <= MAX_BYTES
        return fits and self.num_used < self._most - self._drain.num_open
