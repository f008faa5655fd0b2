"""News of running requests on their way to one reader in the event loop.

Filled by the output processor through `Inbox`, emptied by the server's streams and by
`AsyncLLM.generate`. Never waits for its reader, and never keeps more for it than a limit.
"""

from __future__ import annotations

import asyncio

from octavo.errors import OctavoError, SlowReaderError
from octavo.outputs import DeltaSum, OutputDelta

MAX_WAITING_TOKENS = 4096
"""Tokens that a reader may be behind; more are not kept for somebody who does not read."""

News = tuple[int, OutputDelta, bool]
"""Whose (the tag of its inbox), what was added, and whether the request has ended with it."""


class Mailbox:
    """What the requests of one reader have gained since it looked last."""

    __slots__ = ("_error", "_loop", "_max_tokens", "_news", "_num_tokens", "_waiter")

    def __init__(self, max_waiting_tokens: int | None = MAX_WAITING_TOKENS) -> None:
        """Made in the event loop of its reader. None: no limit (a reader that keeps it all)."""
        self._loop = asyncio.get_running_loop()
        self._max_tokens = max_waiting_tokens
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
        self._num_tokens += len(delta.token_ids)
        if self._max_tokens is not None and self._num_tokens > self._max_tokens:
            self._news.clear()
            self.fail(
                SlowReaderError(
                    f"the client is more than {self._max_tokens} tokens behind; read faster, or "
                    "ask for the whole answer with stream: false"
                )
            )
            return False
        self._wake()
        return True

    def fail(self, error: OctavoError) -> None:
        """Ends the reading with `error`, after the news that are there."""
        if self._error is None:
            self._error = error
            self._wake()

    @property
    def has_news(self) -> bool:
        """Whether `take` would not wait."""
        return bool(self._news) or self._error is not None

    async def take(self) -> list[News]:
        """Waits for news and returns all of them, those of one sequence as one. Raises the error
        that ended a request."""
        while not self._news:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news, self._num_tokens = self._news, [], 0
        return news if len(news) == 1 else _joined(news)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Inbox:
    """The receiver of one request among those of a mailbox."""

    __slots__ = ("_mailbox", "_tag")

    def __init__(self, mailbox: Mailbox, tag: int = 0) -> None:
        self._mailbox = mailbox
        self._tag = tag

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self._mailbox.put(self._tag, delta, finished)

    def fail(self, error: OctavoError) -> None:
        self._mailbox.fail(error)


def _joined(news: list[News]) -> list[News]:
    """Returns one entry a sequence, in the order of their last ones: a request's end stays last."""
    sums: dict[tuple[int, int], DeltaSum] = {}
    ends: dict[tuple[int, int], bool] = {}
    for tag, delta, finished in news:
        key = (tag, delta.index)
        earlier = sums.pop(key, None)
        if earlier is None:
            earlier = DeltaSum(delta)
        else:
            earlier.add(delta)
        sums[key], ends[key] = earlier, finished
    return [(key[0], added.total(), ends[key]) for key, added in sums.items()]
