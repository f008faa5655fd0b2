"""The one way to a server's guard: bounded in time, in checks at once and in checks that wait.

Made by `load`, asked by `call`. A guard that is down, slow or wrong is counted and logged, and then
either everything is refused or everything is let through, as the operator chose.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from octavo.engine.messages import is_unicode
from octavo.guard import Guard, GuardCheck, Refuse, Rewrite, Stage, Verdict
from octavo.observe.collectors import FastHistogram
from octavo.server.errors import ApiError

logger = logging.getLogger(__name__)

UNAVAILABLE = "guard_unavailable"
"""The code of what is refused because the guard has not answered."""
LOG_SECONDS = 10.0
"""Between two log lines about a guard that does not answer."""
MAX_REASON_CHARS = 1024
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimits:
    """What a guard gets, and what holds when that is not enough."""

    seconds: float
    """For one check, its waiting included."""
    max_concurrent: int
    max_waiting: int
    fails_open: bool
    """Whether texts are let through that the guard has not judged."""


@runtime_checkable
class Closing(Protocol):
    """A guard that holds something open."""

    async def close(self) -> None: ...


class GuardError(Exception):
    """The guard has answered what is no verdict."""


class Gate:
    """A guard, asked from one event loop."""

    def __init__(self, guard: Guard, limits: GateLimits, stages: frozenset[Stage], window: int):
        """`window` is the number of characters of a streamed answer that are shown at once; 0: all
        of it, at its end."""
        self.stages = stages
        self.window = window
        self._guard = guard
        self._limits = limits
        call = type(guard).__call__
        self._is_async = inspect.iscoroutinefunction(guard) or inspect.iscoroutinefunction(call)
        self._room = asyncio.Semaphore(limits.max_concurrent)
        self.num_running = 0
        self.num_waiting = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self.seconds = FastHistogram(
            "octavo:guard_check_seconds",
            "Time of a check by the guard, waiting for its turn included",
            _BUCKETS,
            {},
        )
        self._tasks: set[asyncio.Future[Any]] = set()
        self._logged_at = -LOG_SECONDS
        self._num_unlogged = 0
        self._last_failure = ""
        self._log_timer: asyncio.TimerHandle | None = None

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """Checks by stage and outcome: allowed, rewritten, refused, timeout, error, full."""
        return self._counts

    async def decide(self, check: GuardCheck) -> Verdict:
        """Returns what the guard says of a check. Raises ApiError (503) if it says nothing in time,
        and nothing is let through then."""
        limits = self._limits
        if self._room.locked() and self.num_waiting >= limits.max_waiting:
            message = f"{self.num_waiting} checks wait already (limit {limits.max_waiting})"
            return self._unjudged(check, "full", message)
        began = time.monotonic()
        try:
            async with asyncio.timeout(limits.seconds):
                await self._turn()
                verdict = _checked(await _told(self._begin(check)), check)
        except TimeoutError:
            return self._unjudged(check, "timeout", f"no answer within {limits.seconds:g} s")
        except Exception as error:  # the edge: whatever a foreign function raises
            return self._unjudged(check, "error", _described(error))
        finally:
            self.seconds.observe(time.monotonic() - began)
        self._counts[check.stage, _OUTCOMES[type(verdict)]] += 1
        return verdict

    async def close(self) -> None:
        """Lets the guard's connections go."""
        for task in self._tasks:
            task.cancel()
        if self._log_timer is not None:
            self._log_timer.cancel()
            self._log()
        if isinstance(self._guard, Closing):
            await self._guard.close()

    async def _turn(self) -> None:
        self.num_waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.num_waiting -= 1

    def _begin(self, check: GuardCheck) -> asyncio.Future[Any]:
        """Returns what the guard is about to say. Whoever does not wait any longer leaves it its
        place until it has come to an end: no more than so many ever run."""
        self.num_running += 1
        loop = asyncio.get_running_loop()
        if self._is_async:
            work = cast(Callable[[GuardCheck], Awaitable[Verdict]], self._guard)(check)
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._ended)
            return task
        told: asyncio.Future[Any] = loop.create_future()

        def work_in_thread() -> None:
            result, failure = None, None
            try:
                result = self._guard(check)
            except BaseException as error:  # told in the event loop
                failure = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._tell, told, result, failure)

        # A thread of its own, and a daemon: one that hangs must not keep the process from ending.
        threading.Thread(target=work_in_thread, name="guard", daemon=True).start()
        return told

    def _tell(
        self, told: asyncio.Future[Any], result: object, failure: BaseException | None
    ) -> None:
        self._ended(told)
        if told.done():
            return
        if failure is not None:
            told.set_exception(GuardError(_described(failure)))
        else:
            told.set_result(result)

    def _ended(self, work: asyncio.Future[Any]) -> None:
        self._tasks.discard(work)
        if work.done() and not work.cancelled():
            work.exception()  # Perhaps nobody waits for it any more.
        self.num_running -= 1
        self._room.release()

    def _unjudged(self, check: GuardCheck, outcome: str, reason: str) -> None:
        """Counts a check without a verdict. Raises ApiError unless all is let through then."""
        self._counts[check.stage, outcome] += 1
        self._num_unlogged += 1
        self._last_failure = reason
        if self._log_timer is None:
            wait = self._logged_at + LOG_SECONDS - time.monotonic()
            if wait <= 0:
                self._log()
            else:
                # Perhaps no other check fails later, and these would never be told of.
                self._log_timer = asyncio.get_running_loop().call_later(wait, self._log)
        if not self._limits.fails_open:
            message = "the guard of this server has not answered; try again later"
            headers = {"Retry-After": "1"}
            raise ApiError(503, message, code=UNAVAILABLE, headers=headers)

    def _log(self) -> None:
        what = "let through unjudged" if self._limits.fails_open else "refused"
        message = "%d checks by the guard failed and were %s; the last: %s"
        logger.error(message, self._num_unlogged, what, self._last_failure)
        self._logged_at, self._num_unlogged, self._log_timer = time.monotonic(), 0, None


def because(refusal: Refuse) -> str:
    """Returns the end of a sentence that tells of a refusal: its reason, if it has one."""
    return f": {refusal.reason}" if refusal.reason else ""


def _described(error: BaseException) -> str:
    """Words a failure for the log. The text of a foreign exception may quote what the guard was
    shown, so that it is left out; where it was raised says as much to whoever wrote the guard."""
    if isinstance(error, GuardError):  # our own words
        return str(error)
    places = traceback.extract_tb(error.__traceback__, limit=-1)
    where = "".join(f" at {one.filename}:{one.lineno}" for one in places)
    return f"{type(error).__name__}{where} (its text may quote a prompt, and is not logged)"


async def _told(work: asyncio.Future[Any]) -> object:
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if work.cancelled() and task is not None and not task.cancelling():
            # Nobody wanted us to end: it has cancelled itself.
            raise GuardError("it was cancelled") from None
        raise


_OUTCOMES = {type(None): "allowed", Rewrite: "rewritten", Refuse: "refused"}


def _checked(verdict: object, check: GuardCheck) -> Verdict:
    """Returns a verdict that fits its check. Raises GuardError."""
    if verdict is None:
        return None
    if isinstance(verdict, Refuse):
        return Refuse(str(verdict.reason)[:MAX_REASON_CHARS])
    if not isinstance(verdict, Rewrite):
        kind = type(verdict).__name__
        raise GuardError(f"a guard returns None, Refuse or Rewrite, and this one a {kind}")
    texts = tuple(verdict.texts)
    if len(texts) != len(check.texts):
        raise GuardError(f"it has rewritten {len(check.texts)} texts as {len(texts)}")
    for text, given in zip(texts, check.texts, strict=True):
        if not isinstance(text, str):
            raise GuardError(f"it has rewritten {given.place} as a {type(text).__name__}")
        if not is_unicode(text):
            raise GuardError(f"it has rewritten {given.place} with half a surrogate pair")
        if given.is_fixed and text != given.text:
            raise GuardError(f"{given.place} cannot be rewritten; refuse it, or leave it")
    if all(text == given.text for text, given in zip(texts, check.texts, strict=True)):
        return None
    return Rewrite(texts)
