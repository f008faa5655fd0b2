"""What comes back to whoever asked: deltas as they are streamed, and outputs that add them up.

Made by the output processor and the faces (LLM, AsyncLLM, server). No torch, no text processing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

import msgspec
import numpy as np

from octavo.errors import OctavoError
from octavo.moments import Moment
from octavo.request import Logprob, PackedLogprobs, PackedPrompt, PositionLogprobs, Request


class Position(dict[int, Logprob]):
    """Log-probabilities of one position by token id, as in vLLM: the drawn (or prompt) token first.

    Positions were tuples once: 0, where no token has that id, still finds the token itself.
    """

    def __missing__(self, token_id: int) -> Logprob:
        if token_id == 0 and self:
            return next(iter(self.values()))
        raise KeyError(token_id)


class PromptLogprobs(Sequence[PositionLogprobs | None]):
    """The positions of a prompt, None first, each made when it is looked at."""

    __slots__ = ("_ids", "_logprobs", "_ranks")

    def __init__(self, packed: PackedLogprobs) -> None:
        self._ranks = np.frombuffer(packed.ranks, np.int32)
        shape = (len(self._ranks), -1) if len(self._ranks) else (0, 0)
        self._ids = np.frombuffer(packed.token_ids, np.int32).reshape(shape)
        self._logprobs = np.frombuffer(packed.logprobs, np.float32).reshape(shape)

    def __len__(self) -> int:
        return 1 + len(self._ranks)

    @overload
    def __getitem__(self, place: int) -> PositionLogprobs | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[PositionLogprobs | None]: ...
    def __getitem__(
        self, place: int | slice
    ) -> PositionLogprobs | list[PositionLogprobs | None] | None:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place == 0:
            return None
        row = place - 1
        ranks = itertools.chain((int(self._ranks[row]),), itertools.count(1))
        entries = zip(self._ids[row].tolist(), self._logprobs[row].tolist(), ranks, strict=False)
        return tuple(Logprob(token_id=i, logprob=value, rank=rank) for i, value, rank in entries)


MAX_GROWN_TOKENS = 64
"""Of a delta that has grown while it waited."""


class OutputDelta(msgspec.Struct, kw_only=True, gc=False):
    """What one round added to one sequence of a request.

    A Struct and not a dataclass: one is made for every streamed token. Nothing in it refers back
    to it: no collector need know it.
    """

    index: int
    """Which of the request's `n` sequences."""
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[PositionLogprobs] = ()
    """Parallel to `token_ids` where asked, else empty."""
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None
    """With the first delta of a request that asked; None for the first prompt position."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; 0 until the first token."""
    scheduled_time: float | None = None
    """When the request first entered a step; seconds of the monotonic clock."""
    time: float = 0.0
    """When the front end learned of it; seconds of the monotonic clock."""
    vector: bytes | None = None
    """float32: what a request that asked for no tokens has come to."""
    moments: Sequence[Moment] = ()
    """As in TokenDelta."""
    is_waiting: bool = False
    """Whether its reader has not looked yet, and it may still `grow`."""

    def grow(self, token_ids: Sequence[int], text: str, time: float) -> bool:
        """Adds tokens that came later, if there are few enough yet: text that has grown long would
        be copied again and again. Returns whether it did."""
        earlier = self.token_ids
        if type(earlier) is list:
            if len(earlier) >= MAX_GROWN_TOKENS:
                return False
            earlier += token_ids
        else:
            self.token_ids = [*earlier, *token_ids]
        if text:
            self.text += text
        self.time = time
        return True


class DeltaSum:
    """Adds up successive deltas of one sequence; each costs its own length, not the history."""

    __slots__ = ("_ids", "_last", "_logprobs", "_num_cached", "_pieces", "_prompt", "_scheduled")

    def __init__(self, first: OutputDelta) -> None:
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._prompt: Sequence[PositionLogprobs | None] | None = None
        self._num_cached = 0
        self._scheduled: float | None = None
        self._last = first
        self.add(first)

    def add(self, delta: OutputDelta) -> None:
        if delta.text:
            self._pieces.append(delta.text)
        self._ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self._prompt = delta.prompt_logprobs
        self._num_cached = max(self._num_cached, delta.num_cached_tokens)
        self._scheduled = self._scheduled or delta.scheduled_time
        self._last = delta

    def total(self) -> OutputDelta:
        """Returns the deltas as one."""
        last = self._last
        return OutputDelta(
            index=last.index,
            text="".join(self._pieces),
            token_ids=self._ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            num_cached_tokens=self._num_cached,
            scheduled_time=self._scheduled,
            time=last.time,
            vector=last.vector,
        )


class Receiver(Protocol):
    """Who is told of a request's progress, in the thread that processes the engine's news."""

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        """Takes what was added; `finished` with the last delta of the request."""
        ...

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        """A delta that it has set to wait (`is_waiting`) has grown by so many tokens."""
        ...

    def fail(self, error: OctavoError) -> None:
        """The request has ended with `error`; nothing more comes."""
        ...


class CompletionOutput:
    """One sequence as the user sees it. `text` is kept in pieces and joined when it is read."""

    __slots__ = (
        "_pieces",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "message",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        *,
        index: int,
        text: str = "",
        token_ids: list[int] | None = None,
        cumulative_logprob: float | None = None,
        logprobs: list[Position] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> None:
        self.index = index
        self._pieces = [text] if text else []
        self.token_ids: list[int] = [] if token_ids is None else token_ids
        self.cumulative_logprob = cumulative_logprob
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.message: dict[str, Any] | None = None
        """Of a chat that has ended: the answer as the next message of the conversation, with
        content, and where there are some reasoning and tool_calls."""

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, delta: OutputDelta) -> None:
        """Takes what a round added; costs the addition, not the history."""
        if delta.text:
            self._pieces.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self.logprobs is not None and delta.logprobs:
            total = sum(position[0].logprob for position in delta.logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + total
            self.logprobs.extend(map(by_token_id, delta.logprobs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompletionOutput) and _shown(self) == _shown(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in _shown(self).items())
        return f"CompletionOutput({shown})"


def _shown(output: CompletionOutput) -> dict[str, Any]:
    names = ("index", "text", "token_ids", "cumulative_logprob", "logprobs")
    return {name: getattr(output, name) for name in (*names, "finish_reason", "stop_reason")}


def by_token_id(position: PositionLogprobs) -> Position:
    """Returns a position's entries by token id, the drawn token first; entries of one id are one,
    and the first of them, which has the true rank, stays."""
    found = Position()
    for entry in position:
        found.setdefault(entry.token_id, entry)
    return found


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Times of one request, seconds of the engine's monotonic clock."""

    arrival_time: float = 0.0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    def note(self, delta: OutputDelta) -> None:
        """Takes over the times that a delta tells."""
        if self.scheduled_time is None:
            self.scheduled_time = delta.scheduled_time
        if self.first_token_time is None and delta.token_ids:
            self.first_token_time = delta.time


@dataclass(slots=True, kw_only=True)
class RequestOutput(PackedPrompt):
    """One request as the user sees it: cumulative, with this round's additions beside it."""

    request_id: str
    prompt: str | None
    packed_prompt: bytes = field(repr=False)
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[Position | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    deltas: list[OutputDelta] = field(default_factory=list, repr=False)
    """What the newest round added, sequence by sequence: parts, not cumulative."""

    @staticmethod
    def empty(request: Request, request_id: str, prompt: str | None) -> RequestOutput:
        """Returns the output of a request that has gained nothing yet, under the user's id."""
        params = request.params
        outputs = [
            CompletionOutput(
                index=index,
                cumulative_logprob=None if params.logprobs is None else 0.0,
                logprobs=None if params.logprobs is None else [],
            )
            for index in range(params.n)
        ]
        return RequestOutput(
            request_id=request_id,
            prompt=prompt,
            packed_prompt=request.packed_prompt,
            outputs=outputs,
            metrics=RequestMetrics(arrival_time=request.arrival_time),
        )

    def add(self, delta: OutputDelta) -> None:
        """Takes what a round added to one of the sequences."""
        sequence = self.outputs[delta.index]
        sequence.add(delta)
        if delta.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [
                None if p is None else by_token_id(p) for p in delta.prompt_logprobs
            ]
        self.metrics.note(delta)
        if delta.finish_reason is not None:
            self.finished = all(s.finish_reason is not None for s in self.outputs)
            if self.finished:
                self.metrics.finished_time = delta.time

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids!r}, outputs={self.outputs!r}, "
            f"finished={self.finished!r}, num_cached_tokens={self.num_cached_tokens!r}, "
            f"prompt_logprobs={self.prompt_logprobs!r}, metrics={self.metrics!r})"
        )


def with_texts(delta: OutputDelta, token_text: Callable[[int], str | None]) -> OutputDelta:
    """Returns `delta` with the text of each reported token; itself if it reports none."""
    if not delta.logprobs and delta.prompt_logprobs is None:
        return delta

    def named(position: PositionLogprobs) -> PositionLogprobs:
        return tuple(
            Logprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                rank=entry.rank,
                decoded_token=token_text(entry.token_id),
            )
            for entry in position
        )

    prompt = delta.prompt_logprobs
    return msgspec.structs.replace(
        delta,
        logprobs=[named(position) for position in delta.logprobs],
        prompt_logprobs=None if prompt is None else [p and named(p) for p in prompt],
    )
