"""How long one callback holds the event loop, in CPU time of the loop's thread: a debug mode.

Installed on a running loop by the server (`--debug-loop-holds`), read by metrics and tests. Works
on asyncio's loops and on uvloop's, which has no hook for slow callbacks. Never stops a callback.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import AsyncGeneratorType, CoroutineType
from typing import Any

logger = logging.getLogger(__name__)

PROMISED_SECONDS = 0.020
"""No callback holds the loop longer; one that does is a fault of ours, and logged."""

_SCHEDULERS = ("call_soon", "call_soon_threadsafe")
_TIMERS = ("call_later", "call_at")
_WATCHERS = ("add_reader", "add_writer")


class LoopHoldMonitor:
    """Measures every callback of one loop. CPU time, since waiting for a core is nobody's fault."""

    def __init__(self, promised_seconds: float = PROMISED_SECONDS) -> None:
        self._promised_seconds = promised_seconds
        self.longest_seconds = 0.0
        self.longest_callback = ""
        """What held it: names only, nothing of what a client sent."""

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measures all that is scheduled on `loop` from now on. Call it in the loop's thread.

        Every step of a task and every callback of a future goes through `call_soon`; what a
        protocol gets directly from the sockets does not, so protocols call `measure` themselves.
        """
        for name in _SCHEDULERS:
            setattr(loop, name, self._wrapped(getattr(loop, name), 0))
        for name in (*_TIMERS, *_WATCHERS):
            setattr(loop, name, self._wrapped(getattr(loop, name), 1))

    def _wrapped(self, schedule: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Returns `schedule` for measured callbacks; the callback is argument `place`."""
        measure = self.measure

        def measured(*args: Any, **kwargs: Any) -> Any:
            return schedule(*args[:place], measure, *args[place:], **kwargs)

        return measured

    def measure(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Calls `callback(*args)` and notes how long it held the loop."""
        begun = time.thread_time()
        try:
            return callback(*args)
        finally:
            seconds = time.thread_time() - begun
            if seconds > min(self._promised_seconds, self.longest_seconds):
                self._note(seconds, callback)

    def _note(self, seconds: float, callback: Callable[..., Any]) -> None:
        if seconds > self._promised_seconds:
            logger.warning(
                "%s held the event loop for %.1f ms of CPU time", _name(callback), seconds * 1e3
            )
        if seconds > self.longest_seconds:
            self.longest_seconds, self.longest_callback = seconds, _name(callback)


def _name(callback: Any) -> str:
    """Returns who runs in `callback`; of a task, also where its step ended."""
    try:
        task = callback.__self__
    except AttributeError:
        task = None
    if not isinstance(task, asyncio.Task):
        return _qualified_name(callback)
    names: list[str] = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        names.append(_qualified_name(awaited))
        if isinstance(awaited, CoroutineType):
            awaited = awaited.cr_await
        elif isinstance(awaited, AsyncGeneratorType):
            awaited = awaited.ag_await
        else:
            awaited = None
    return "step of " + " > ".join(names)


def _qualified_name(value: Any) -> str:
    try:
        return str(value.__qualname__)
    except AttributeError:
        return value.__class__.__qualname__
