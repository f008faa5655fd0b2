"""Whether an engine process still moves, seen from the front: beats in, a verdict out.

Run by the client once the engine is loaded. The engine beats at every layer of a step on the CPU,
at every step, and every second when it is idle, so that silence means that it is hung or stopped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from octavo.engine.child import EngineProcess
from octavo.engine.vitals import STACK_SIGNAL, Reading, Vitals

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
BUILD_FACTOR = 10
"""How much longer a step may be silent while it builds a kernel."""
DRAIN_SECONDS = 10.0
"""How long it may be silent while the server ends."""
_STACK_SECONDS = 1.0


class Watchdog:
    """Adds up the time for which beats were missing."""

    def __init__(self, limit_seconds: float) -> None:
        """`limit_seconds`: 0 for no limit, except during a drain."""
        self._limit = limit_seconds or math.inf
        self._last: Reading | None = None
        self._looked = 0.0
        self._silent = 0.0
        self.is_draining = False

    def look(self, reading: Reading, now: float) -> float | None:
        """Returns for how many seconds the engine has been silent if that is too long.

        Time counts as it was watched: two looks that are far apart mean that the watcher itself
        was suspended, which is no fault of the engine's.
        """
        elapsed, self._looked = now - self._looked, now
        if self._last is None or reading.beats != self._last.beats:
            self._last, self._silent = reading, 0.0
            return None
        self._silent += min(elapsed, 2 * LOOK_SECONDS)
        limit = self._limit * (BUILD_FACTOR if reading.is_building else 1)
        if self.is_draining:
            limit = min(limit, DRAIN_SECONDS)
        return self._silent if self._silent >= limit else None


async def await_silence(
    watchdog: Watchdog, vitals: Vitals, clock: Callable[[], float] = time.monotonic
) -> float:
    """Returns when the engine is hung, with the seconds of its silence."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        silent = watchdog.look(vitals.read(), clock())
        if silent is not None:
            return silent


async def end_hung(process: EngineProcess, vitals: Vitals) -> None:
    """Logs where the process hangs, and kills it."""
    if _is_stopped(process.pid):
        logger.error("the engine process %d is stopped by a signal; it is killed", process.pid)
    else:
        process.send_signal(STACK_SIGNAL)
        await asyncio.sleep(_STACK_SECONDS)
        stacks = vitals.stacks() or "it does not tell where"
        logger.error("the engine process %d hangs and is killed:\n%s", process.pid, stacks)
    process.kill()


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it is gone, or this is no Linux
        return False
    return state in "Tt"
