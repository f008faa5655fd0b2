"""News of running requests on their way to one reader in the event loop.

Filled by the output processor through `Inbox`, emptied by the server's streams and by
`AsyncLLM.generate`. Never waits for its reader, and never keeps more for it than a limit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from octavo.errors import OctavoError, SlowReaderError
from octavo.outputs import DeltaSum, OutputDelta

MAX_WAITING_TOKENS = 4096
"""Tokens that a reader may be behind; more are not kept for somebody who does not read."""

News = tuple[int, OutputDelta, bool]
"""Whose (the tag of its inbox), what was added, and whether the request has ended with it."""


Deliver = Callable[[int, OutputDelta, bool], bool]
"""Takes what the sequence of a request with this tag gained, and whether the request has ended;
returns whether more is welcome."""

Reader = Callable[[list[News]], bool]
"""Takes news as they come, without waiting; or returns False, and has not taken them."""

TURNS_AT_ONCE = 64
"""Readers that are called before others have their turn: about a millisecond."""
ROUNDS = 4
"""In which all have had their turns, if those of a round may be so many."""


class Turns:
    """Calls what is due in the next rounds of the event loop, some at once: thousands of readers
    have news at the same time, and a task that wakes up for each would cost as much as all else.
    One event loop's."""

    def __init__(self, at_once: int = TURNS_AT_ONCE, most: int = 0) -> None:
        """`at_once` are called in a round, up to `most` where many wait."""
        self._at_once = at_once
        self._most = most
        self._due: deque[Callable[[], object]] = deque()
        self._first: deque[Callable[[], object]] = deque()
        self._is_scheduled = False
        self._num_passed = 0  # of this round, who did not have to wait

    def add(self, turn: Callable[[], object], *, is_first: bool = False) -> None:
        """Has `turn` called soon; it must not raise. `is_first`: before all that are not."""
        (self._first if is_first else self._due).append(turn)
        if not self._is_scheduled:
            self._schedule()

    async def wait(self) -> None:
        """Returns when it is the caller's turn: at once for the first of a round."""
        if not (self._due or self._first) and self._num_passed < self._at_once:
            self._num_passed += 1
            if not self._is_scheduled:
                self._schedule()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.add(lambda: turn.done() or turn.set_result(None))
        await turn

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        due, first = self._due, self._first
        num_left = max(self._at_once, min(self._most, len(due) // ROUNDS))
        while first and num_left:
            first.popleft()()
            num_left -= 1
        for _ in range(min(len(due), num_left)):
            due.popleft()()
        self._is_scheduled = False
        self._num_passed = 0
        if due or first:
            self._schedule()


class Mailbox:
    """What the requests of one reader have gained since it looked last."""

    __slots__ = (
        "_error",
        "_grows",
        "_is_due",
        "_is_first",
        "_loop",
        "_max_tokens",
        "_news",
        "_num_tokens",
        "_reader",
        "_turns",
        "_waiter",
    )

    def __init__(
        self,
        max_waiting_tokens: int | None = MAX_WAITING_TOKENS,
        turns: Turns | None = None,
        *,
        grows: bool = False,
    ) -> None:
        """Made in the event loop of its reader. None: no limit (a reader that keeps it all).
        Without `turns`, `take` has no use for a reader. `grows`: whether deltas that wait here may
        grow, of which `grow` is then told."""
        self._grows = grows
        self._loop = asyncio.get_running_loop()
        self._max_tokens = max_waiting_tokens
        self._turns = turns
        self._reader: Reader | None = None
        self._is_due = False  # whether our turn will come
        self._is_first = False  # before those of others
        self._news: list[News] = []
        self._num_tokens = 0
        self._error: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, tag: int, delta: OutputDelta, finished: bool) -> bool:
        """Adds news; returns whether more is welcome. A reader too far behind loses what waits,
        and gets SlowReaderError."""
        if self._error is not None:
            return False
        self._news.append((tag, delta, finished))
        if self._grows:
            delta.is_waiting = True
        self._num_tokens = num_waiting = self._num_tokens + len(delta.token_ids)
        if self._max_tokens is not None and num_waiting > self._max_tokens:
            return self._give_up()
        if not self._is_due or (finished and not self._is_first):
            if self._reader is not None and self._turns is not None:
                # Whose answer has ended sends its next request when it has all of it.
                self._is_due, self._is_first = True, finished
                self._turns.add(self._turn, is_first=finished)
            elif self._waiter is not None:
                self._wake()
        return True

    def grow(self, num_tokens: int) -> bool:
        """A delta that waits has grown by so many tokens; returns as `put`."""
        if self._error is not None:
            return False
        self._num_tokens = num_waiting = self._num_tokens + num_tokens
        if self._max_tokens is not None and num_waiting > self._max_tokens:
            return self._give_up()
        return True

    def _give_up(self) -> bool:
        """The reader is too far behind."""
        self._news.clear()
        self.fail(
            SlowReaderError(
                f"the client is more than {self._max_tokens} tokens behind; read faster, or "
                "ask for the whole answer with stream: false"
            )
        )
        return False

    def fail(self, error: OctavoError) -> None:
        """Ends the reading with `error`, after the news that are there."""
        if self._error is None:
            self._error = error
            self._wake()

    @property
    def has_news(self) -> bool:
        """Whether `take` would not wait."""
        return bool(self._news) or self._error is not None

    async def take(self, reader: Reader | None = None) -> list[News]:
        """Waits for news and returns all of them, those of one sequence as one. Raises the error
        that ended a request, or that `reader` raises.

        What comes while it waits is offered to `reader` first, and returned if that refuses it.
        """
        while not self._news:
            if self._error is not None:
                raise self._error
            self._waiter, self._reader = self._loop.create_future(), reader
            try:
                await self._waiter
            finally:
                self._waiter = self._reader = None
        return self._take_all()

    def _take_all(self) -> list[News]:
        news, self._news, self._num_tokens = self._news, [], 0
        return _joined(news)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._reader is None or self._turns is None:
            waiter.set_result(None)
        elif not self._is_due:
            self._is_due = True
            self._turns.add(self._turn)

    def _turn(self) -> None:
        if not self._is_due:
            return  # It came before others, instead of in its order.
        self._is_due = self._is_first = False
        waiter, reader = self._waiter, self._reader
        if waiter is None or waiter.done():
            return  # It is about to look itself.
        if reader is not None and self._news and self._error is None:
            num_tokens, news = self._num_tokens, self._news
            if len(news) == 1:
                news[0][1].is_waiting = False  # nearly always; else as here
            else:
                news = _joined(news)
            self._news, self._num_tokens = [], 0
            try:
                if reader(news):
                    return
            except Exception as error:
                waiter.set_exception(error)
                return
            self._news, self._num_tokens = news, num_tokens
        waiter.set_result(None)


class Inbox:
    """The receiver of one request among those of a mailbox."""

    __slots__ = ("_mailbox", "_tag")

    def __init__(self, mailbox: Mailbox, tag: int = 0) -> None:
        self._mailbox = mailbox
        self._tag = tag

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self._mailbox.put(self._tag, delta, finished)

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        self._mailbox.grow(num_tokens)

    def fail(self, error: OctavoError) -> None:
        self._mailbox.fail(error)


def _joined(news: list[News]) -> list[News]:
    """Returns one entry a sequence, in the order of their last ones: a request's end stays last.
    What was waiting grows no more."""
    if len(news) == 1:
        news[0][1].is_waiting = False
        return news
    sums: dict[tuple[int, int], DeltaSum] = {}
    ends: dict[tuple[int, int], bool] = {}
    for tag, delta, finished in news:
        delta.is_waiting = False
        key = (tag, delta.index)
        earlier = sums.pop(key, None)
        if earlier is None:
            earlier = DeltaSum(delta)
        else:
            earlier.add(delta)
        sums[key], ends[key] = earlier, finished
    return [(key[0], added.total(), ends[key]) for key, added in sums.items()]
