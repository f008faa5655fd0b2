"""An answer on its way to the client, held back until the guard has seen it.

Stands between the engine's news of one request and whoever reads them, whole or streamed. Never
holds up the news of others: each sequence has a check under way at most, and what comes meanwhile
is its next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from octavo.errors import OctavoError
from octavo.guard import Refuse
from octavo.outputs import DeltaSum, OutputDelta
from octavo.request import FinishReason
from octavo.server.errors import ApiError
from octavo.server.guards.call import BEFORE_CHARS, CallGuard, ShownMarks

logger = logging.getLogger(__name__)

_BROKEN = (FinishReason.ERROR, FinishReason.ABORT)


class HeldOutput:
    """The sequences of one request."""

    def __init__(
        self,
        guard: CallGuard,
        marks: ShownMarks,
        *,
        first_index: int,
        num_sequences: int,
        window: int,
        pass_on: Callable[[OutputDelta, bool], None],
        fail: Callable[[OctavoError], None],
    ) -> None:
        """`first_index` is that of the first sequence in the call, `window` the characters that are
        shown at once, 0 for all. `pass_on` gets what is allowed, and whether it is the last of the
        request; `fail` the error of a guard that does not answer."""
        self._guard = guard
        self._marks = marks
        self._first_index = first_index
        self._window = window
        self._pass_on = pass_on
        self._fail = fail
        self._sequences = [_Held() for _ in range(num_sequences)]
        self._num_open = num_sequences
        self._checks: set[asyncio.Task[None]] = set()

    def take(self, delta: OutputDelta) -> None:
        """Takes what a sequence gained."""
        if delta.finish_reason in _BROKEN:
            self.close()
            self._pass_on(delta, True)
            return
        held = self._sequences[delta.index]
        if held.is_over:
            return  # refused: the engine goes on with the others of the request
        held.add(delta)
        if not held.is_checked and held.is_due(self._window):
            held.is_checked = True
            check = asyncio.get_running_loop().create_task(self._check(held))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)

    def close(self) -> None:
        """Nothing more is passed on."""
        for held in self._sequences:
            held.is_over = True
        for check in self._checks:
            check.cancel()

    async def _check(self, held: _Held) -> None:
        try:
            while held.is_due(self._window) and not held.is_over:
                gained = held.take()
                index = self._first_index + gained.index
                told = await self._guard.output(gained, index, held.before, self._marks)
                if isinstance(told, Refuse):
                    told = _refused(gained, told.reason)
                held.before = (held.before + self._marks.show(told.text))[-BEFORE_CHARS:]
                held.is_over = told.finish_reason is not None
                self._num_open -= held.is_over
                self._pass_on(told, not self._num_open)
        except Exception as error:
            # The edge of a task that nobody waits for: the request must not wait for ever.
            self.close()
            self._fail(error if isinstance(error, OctavoError) else _internal(error))
        finally:
            held.is_checked = False


class _Held:
    """What one sequence has gained since its last check."""

    __slots__ = ("_num_chars", "_sum", "before", "is_checked", "is_ended", "is_over")

    def __init__(self) -> None:
        self._sum: DeltaSum | None = None
        self._num_chars = 0
        self.is_ended = False
        self.is_checked = False
        self.is_over = False
        """Whether nothing more is passed on."""
        self.before = ""

    def add(self, delta: OutputDelta) -> None:
        if self._sum is None:
            self._sum = DeltaSum(delta)
        else:
            self._sum.add(delta)
        self._num_chars += len(delta.text)
        self.is_ended = delta.finish_reason is not None

    def is_due(self, window: int) -> bool:
        """Whether there is enough to ask about."""
        return self._sum is not None and (self.is_ended or 0 < window <= self._num_chars)

    def take(self) -> OutputDelta:
        assert self._sum is not None, "it is due"
        total, self._sum, self._num_chars = self._sum.total(), None, 0
        return total


def _internal(error: Exception) -> ApiError:
    logger.error("a check of an answer failed", exc_info=error)
    message = "an internal error; the server's log has the details"
    return ApiError(500, message, code="internal_error")


def _refused(gained: OutputDelta, reason: str) -> OutputDelta:
    """Returns the end of a sequence before what it gained."""
    return OutputDelta(
        index=gained.index,
        prompt_logprobs=gained.prompt_logprobs,
        finish_reason=FinishReason.CONTENT_FILTER.value,
        stop_reason=reason,
        num_cached_tokens=gained.num_cached_tokens,
        scheduled_time=gained.scheduled_time,
        time=gained.time,
    )
