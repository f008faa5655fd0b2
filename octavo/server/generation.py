"""From a parsed body to the engine's news: ids, salts, prompts to tokens, several prompts.

Called by the routes of chat and completions. Never formats an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from msgspec import structs
from starlette.requests import Request as HttpRequest

from octavo.engine.mailbox import MAX_WAITING_TOKENS, Deliver, Mailbox
from octavo.errors import OctavoError, OverloadedError
from octavo.observe.metrics import RequestTrack
from octavo.outputs import DeltaSum, OutputDelta
from octavo.request import FinishReason, Request, SamplingParams
from octavo.server.audit import kept
from octavo.server.auth import check_priority
from octavo.server.call import Call
from octavo.server.errors import ApiError, broken_off
from octavo.server.exchange import Exchange
from octavo.server.guards.call import CallGuard, ShownMarks
from octavo.server.guards.inputs import guard_of
from octavo.server.guards.outputs import HeldOutput
from octavo.server.limits import check_prompt
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.state import ServerState, server_state
from octavo.server.tenants.budgets import NO_LEASE, header_list, reserved
from octavo.server.tenants.callers import caller_of
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought

PREPARED_AT_ONCE = 4
"""Prompts of one call that are checked before others have their turn."""


async def new_call(
    request: HttpRequest,
    body: SamplingFields,
    kind: str,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
    marks: Mapping[int, str] | None = None,
    thought: Thought = NO_THOUGHT,
) -> Call:
    """Returns the call that `body` asks for; `kind` is the prefix of its id, `marks` are Call's,
    `thought` stands before what the answers are held to.

    Raises RequestError if one of the prompts cannot be served, before any of them runs.
    """
    state, known = server_state(request), request.scope["state"]
    guard = guard_of(request)
    check_priority(request, body.priority, state.config)
    engine = state.engine
    engine.check_generates()
    limit = body.truncate_prompt_tokens
    if limit == -1:
        limit = max(1, engine.max_model_len - (params.max_tokens or 1))
    tenant = caller_of(request).tenant
    salt = tenant.salt(body.cache_salt)
    if params.structured_outputs is not None:
        await server_state(request).tokenising.constrain(params.structured_outputs)
    priority = state.priority_of(body.priority)
    requests = []
    for place, ids in enumerate(prompts):
        if place % PREPARED_AT_ONCE == PREPARED_AT_ONCE - 1:
            await asyncio.sleep(0)
        ids = ids if limit is None else ids[-limit:]
        check_prompt(len(ids), state.config.max_prompt_tokens)
        requests.append(
            engine.prepare(
                ids,
                params,
                priority=priority,
                cache_salt=salt,
                share=tenant.share,
                thought=thought,
            )
        )
    exchange: Exchange = known["exchange"]
    if exchange.trace is not None:
        requests = [structs.replace(one, is_traced=True) for one in requests]
        if exchange.tokenising is not None:
            exchange.trace.add_tokenising(*exchange.tokenising)
    exchange.num_prompt_tokens = sum(one.prompt_len for one in requests)
    return Call(
        id=f"{kind}{body.request_id or known['request_id']}",
        created=int(time.time()),
        params=params,
        requests=tuple(requests),
        exchange=exchange,
        tenant=tenant,
        marks=marks,
        guard=guard if guard is not None and guard.sees_output else None,
    )


class StreamedCall:
    """The news of a call's requests, for one reader; a news' tag is the place of its prompt.

    `take` raises what the engine raises, and ApiError for a sequence that ended by an error or was
    aborted from elsewhere. See `streaming.Rounds`.
    """

    __slots__ = ("_mailbox", "_running", "hang_up", "take")

    def __init__(self, state: ServerState, call: Call) -> None:
        # What a guard has held back may come at once: the reader is not behind with it.
        most = MAX_WAITING_TOKENS if call.guard is None else None
        # Whoever keeps the texts, or judges them, has seen them when they come.
        grows = call.guard is None and call.exchange.told is None
        self._mailbox = mailbox = Mailbox(most, turns=state.turns, grows=grows)
        self._running = _Running(
            *(state, call, mailbox.put, mailbox.fail, mailbox.grow),
            refuse=self._refuse,
            is_streamed=True,
        )
        self.take = self._mailbox.take
        self.hang_up: Callable[[], None] | None = None

    def begin(self) -> None:
        self._running.__enter__()

    @property
    def is_over(self) -> bool:
        return not (self._running.num_unfinished or self._mailbox.has_news)

    def close(self, error: BaseException | None) -> None:
        is_failure = isinstance(error, Exception)
        self._running.cancel(FinishReason.ERROR if is_failure else FinishReason.ABORT)
        self.hang_up = None

    def stop(self, error: OctavoError) -> None:
        """Ends the call from elsewhere: its reader gets `error`."""
        self._running.cancel(FinishReason.ABORT)
        self._mailbox.fail(error)

    def _refuse(self) -> None:
        # At once: whoever is slow may never read again.
        self._running.cancel(FinishReason.ABORT)
        if self.hang_up is not None:
            self.hang_up()


async def whole_call(state: ServerState, call: Call) -> list[list[OutputDelta]]:
    """Returns all that the sequences of each prompt came to, by index. Raises as `stream_call`."""
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    sums: list[dict[int, DeltaSum]] = [{} for _ in call.requests]
    num_unfinished = len(call.requests)

    def deliver(tag: int, delta: OutputDelta, finished: bool) -> bool:
        nonlocal num_unfinished
        earlier = sums[tag].get(delta.index)
        if earlier is None:
            sums[tag][delta.index] = DeltaSum(delta)
        else:
            earlier.add(delta)
        num_unfinished -= finished
        if not num_unfinished and not end.done():
            end.set_result(None)
        return True

    def fail(error: OctavoError) -> None:
        if not end.done():
            end.set_exception(error)

    with _Running(state, call, deliver, fail):
        await end
    return [[found[index].total() for index in sorted(found)] for found in sums]


class _Running:
    """A call's requests on their way through the engine, at most as many sequences at once as a
    step holds: the rest of a large call waits here, behind what others have sent since."""

    def __init__(
        self,
        state: ServerState,
        call: Call,
        deliver: Deliver,
        fail: Callable[[OctavoError], None],
        grow: Callable[[int], bool] | None = None,
        *,
        refuse: Callable[[], None] | None = None,
        is_streamed: bool = False,
    ) -> None:
        """`refuse` is called when `deliver` takes no more; `grow` is told of tokens in deltas that
        wait where they were delivered, and returns as `deliver`."""
        self._is_streamed = is_streamed
        self.num_unfinished = len(call.requests)
        told = call.exchange.told
        self.deliver = deliver if told is None else kept(told, call.params.n, deliver)
        self.grow = grow
        self._fail, self._refuse = fail, refuse
        self._has_failed = False
        self._call = call
        self._state = state
        self._lease = NO_LEASE
        self._engine = state.engine
        self._metrics = state.metrics
        self._exchange = call.exchange
        self._marks = call.marks
        self._most = call.num_at_once(state.engine.max_num_seqs)
        self._todo = deque(enumerate(call.requests))
        self._open: dict[int, _Progress] = {}

    def fail(self, error: OctavoError) -> None:
        """Has the call end with `error`, which its reader is still to be told."""
        self._has_failed = True
        self._fail(error)

    def refuse(self) -> None:
        """Nobody reads on: what is there is not told. An error that ends the call is."""
        if not self._has_failed and self._refuse is not None:
            self._refuse()

    def __enter__(self) -> _Running:
        call, state = self._call, self._state
        if call.tenant.limits.is_counted:
            is_batch = state.priority is not None
            num_tokens = sum(map(self._num_taken, call.requests))
            self._lease = state.budgets.take(call.tenant, num_tokens, is_batch)
            call.exchange.headers += header_list(self._lease.facts, call.exchange.is_message)
        try:
            self._submit()
        except BaseException:
            self.cancel(FinishReason.ERROR)
            raise
        return self

    def _num_taken(self, request: Request) -> int:
        return reserved(request, self._call.params.max_tokens is not None)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Ends what runs: the client has left, or one of the requests has failed."""
        is_failure = kind is not None and issubclass(kind, Exception)
        self.cancel(FinishReason.ERROR if is_failure else FinishReason.ABORT)

    def cancel(self, reason: FinishReason) -> None:
        """Ends all that runs, and what would have followed."""
        for _, request in self._todo:
            self._lease.settle(self._num_taken(request), 0)
        self._todo.clear()
        open_now, self._open = self._open, {}
        for progress in open_now.values():
            self._engine.cancel(progress.request.request_id)
            progress.stop()
            self._end(progress, reason)
        self._lease.close()
        self._refuse = None  # It refers to whoever has this: both would wait for a collection.

    def ended(self, tag: int, reason: str) -> None:
        """Takes leave of one request, and lets the next begin."""
        progress = self._open.pop(tag, None)
        if progress is None:
            return
        self._end(progress, reason)
        self.num_unfinished -= 1
        if not self.num_unfinished:
            self._lease.close()
        try:
            self._submit()
        except OctavoError as error:
            self.fail(error)

    def _end(self, progress: _Progress, reason: str) -> None:
        track, exchange = progress.track, self._exchange
        track.end(reason)
        if exchange.trace is not None:
            exchange.trace.add_request(progress.request, track, reason)
        if self._lease is not NO_LEASE:
            request = progress.request
            self._lease.settle(self._num_taken(request), request.prompt_len + track.num_tokens)
        exchange.num_output_tokens += track.num_tokens
        exchange.num_cached_tokens += track.num_cached_tokens
        if exchange.first_token_seconds is None:
            exchange.first_token_seconds = track.first_token_seconds

    def _submit(self) -> None:
        while self._todo and len(self._open) < self._most:
            tag, request = self._todo[0]
            progress = self._progress(tag, request)
            self._open[tag] = progress
            try:
                self._engine.submit(request, progress, self._marks)
            except OctavoError as error:
                del self._open[tag]
                if self._open and isinstance(error, OverloadedError):
                    return  # others fill the queue: the next try is when one of ours has ended
                raise
            self._todo.popleft()

    def _progress(self, tag: int, request: Request) -> _Progress:
        track, guard = self._metrics.track(request), self._call.guard
        if guard is None:
            return _Progress(self, tag, request, track)
        window = guard.window if self._is_streamed else 0
        return _GuardedProgress(self, tag, request, track, guard, window)

    def abandon(self, request: Request) -> None:
        """Has the engine end a request of which nothing more is wanted."""
        self._engine.cancel(request.request_id)

    @property
    def marks(self) -> Mapping[int, str] | None:
        return self._marks


class _Progress:
    """The receiver of one request of a call."""

    __slots__ = ("_deliver", "_observe", "_running", "_tag", "request", "track")

    def __init__(self, running: _Running, tag: int, request: Request, track: RequestTrack) -> None:
        self._running = running
        self._deliver, self._observe = running.deliver, track.observe
        self._tag = tag
        self.request = request
        self.track = track

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self._observe(delta)
        if delta.finish_reason is not None:
            self.end(delta, finished)
        if not self._deliver(self._tag, delta, finished):
            self._running.refuse()

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        self.track.gain(delta, num_tokens)
        assert self._running.grow is not None, "no delta waits here"
        if not self._running.grow(num_tokens):
            self._running.refuse()

    def end(self, delta: OutputDelta, finished: bool) -> None:
        """Takes the end of a sequence, and of the request if it is the last."""
        reason = delta.finish_reason
        if reason == FinishReason.ERROR:
            self._running.fail(broken_off(str(delta.stop_reason)))
        elif reason == FinishReason.ABORT:
            self._running.fail(ApiError(503, "the request was aborted", code="aborted"))
        if finished:
            self._running.ended(self._tag, reason or FinishReason.STOP)

    def fail(self, error: OctavoError) -> None:
        self._running.fail(error)

    def stop(self) -> None:
        """Nothing more is wanted."""


class _GuardedProgress(_Progress):
    """The same, with a guard before the reader: tokens count when they come, not when they go."""

    __slots__ = ("_output",)

    def __init__(
        self,
        running: _Running,
        tag: int,
        request: Request,
        track: RequestTrack,
        guard: CallGuard,
        window: int,
    ) -> None:
        super().__init__(running, tag, request, track)
        n = request.params.n
        self._output = HeldOutput(
            guard,
            ShownMarks(running.marks, guard.tokenizer),
            first_index=tag * n,
            num_sequences=n,
            window=window,
            pass_on=self._pass_on,
            fail=running.fail,
        )

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self._observe(delta)
        self._output.take(delta)

    def _pass_on(self, delta: OutputDelta, finished: bool) -> None:
        if finished and delta.finish_reason == FinishReason.CONTENT_FILTER:
            self._running.abandon(self.request)
        if delta.finish_reason is not None:
            self.end(delta, finished)
        if not self._deliver(self._tag, delta, finished):
            self._running.refuse()

    def fail(self, error: OctavoError) -> None:
        self._output.close()
        super().fail(error)

    def stop(self) -> None:
        self._output.close()
