"""Owns the text of running requests: deltas of token ids from the core become deltas of text.

Called by LLM and AsyncLLM after every step, in the process that speaks to the user. Tells each
request's receiver, and says which sequences a stop string has ended; never speaks to the core.

    open -> process (any number of times) -> its last delta: forgotten
        \\-> close                         -> forgotten
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from octavo.engine.detokenizer import Detokenizer
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import OctavoError
from octavo.outputs import OutputDelta, PromptLogprobs, Receiver
from octavo.request import FinishReason, Request, TokenDelta


class OutputProcessor:
    """Texts of all open requests. One owner calls it; not thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer, deltas have token ids and no text."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _Open] = {}
        self.num_sequences = 0
        """Of all open requests, the finished ones of each among them."""

    def open(
        self, request: Request, receiver: Receiver, marks: Mapping[int, str] | None = None
    ) -> None:
        """Opens a request, whose id must never have been open; `receiver` is told what it gains.

        `marks` stand in its text for the tokens of these ids.
        """
        assert request.request_id not in self._requests, f"{request.request_id} is open already"
        tokenizer = self._tokenizer if request.params.detokenize else None
        self._requests[request.request_id] = _Open(request, receiver, tokenizer, marks)
        self.num_sequences += request.params.n

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def process(self, deltas: Sequence[TokenDelta], now: float = 0.0) -> list[tuple[str, int]]:
        """Takes one round of deltas at time `now` (of the clock of arrival times).

        Returns (request_id, index) of sequences that a stop string ended and the core still runs.
        Deltas of sequences that are closed or ended here already are passed over: the core runs
        ahead, so a few always come.
        """
        aborts: list[tuple[str, int]] = []
        requests = self._requests
        for delta in deltas:
            opened = requests.get(delta.request_id)
            if opened is None:
                continue
            sequence = opened.sequences[delta.index]
            if sequence.is_finished:
                continue
            token_ids = delta.token_ids
            if (
                delta.finish_reason is None
                and sequence.push is not None
                and len(token_ids) == 1
                and not (delta.logprobs or delta.prompt_logprobs or delta.moments)
            ):
                # Nearly always; no calls between, since every streamed token passes here.
                text, newest = sequence.push(token_ids[0]), sequence.newest
                if newest is not None and newest.is_waiting and newest.grow(token_ids, text, now):
                    opened.receiver.grew(newest, 1)
                    continue
                opened.has_begun = True
                sequence.newest = added = OutputDelta(
                    index=delta.index,
                    text=text,
                    token_ids=token_ids,
                    num_cached_tokens=delta.num_cached_tokens,
                    scheduled_time=delta.scheduled_time,
                    time=now,
                )
                opened.receiver.receive(added, False)
                continue
            added, sequence.newest = _advance(sequence, delta, now), None
            finished = False
            if added.finish_reason is not None:
                sequence.is_finished = True
                opened.num_running -= 1
                if delta.finish_reason is None:
                    aborts.append((delta.request_id, delta.index))
                if not opened.num_running:
                    finished = True
                    self.close(delta.request_id)
            opened.has_begun = True
            opened.receiver.receive(added, finished)
        return aborts

    def close(self, request_id: str) -> bool:
        """Forgets a request; returns whether it was open. The core must be told apart."""
        opened = self._requests.pop(request_id, None)
        if opened is None:
            return False
        self.num_sequences -= len(opened.sequences)
        return True

    def fail(self, request_id: str, error: OctavoError) -> None:
        """Ends a request with an error, if it is open."""
        opened = self._requests.get(request_id)
        if opened is not None:
            self.close(request_id)
            opened.receiver.fail(error)

    def not_begun(self) -> list[str]:
        """Returns the open requests of which nothing was told yet."""
        return [key for key, opened in self._requests.items() if not opened.has_begun]

    def fail_all(self, error: OctavoError) -> None:
        """Ends every open request with an error."""
        for request_id in list(self._requests):
            self.fail(request_id, error)


def _advance(sequence: _Sequence, delta: TokenDelta, now: float) -> OutputDelta:
    """Returns what a delta adds to its sequence."""
    token_ids, text = delta.token_ids, ""
    reason, stop_reason = delta.finish_reason, delta.stop_reason
    detokenizer = sequence.detokenizer
    if detokenizer is not None:
        shown = token_ids
        if reason == FinishReason.STOP and sequence.hides(token_ids[-1]):
            shown = token_ids[:-1]
        text, stopped_by, num_tokens = detokenizer.update(shown)
        if stopped_by is not None:
            token_ids = token_ids[:num_tokens]
            reason, stop_reason = FinishReason.STOP, stopped_by
        elif reason is not None:
            text += detokenizer.finish()
    return OutputDelta(
        index=delta.index,
        text=text,
        token_ids=token_ids,
        logprobs=delta.logprobs[: len(token_ids)] if delta.logprobs else (),
        prompt_logprobs=delta.prompt_logprobs and PromptLogprobs(delta.prompt_logprobs),
        finish_reason=None if reason is None else reason.value,
        stop_reason=stop_reason,
        num_cached_tokens=delta.num_cached_tokens,
        scheduled_time=delta.scheduled_time,
        time=now,
        vector=delta.vector,
        moments=delta.moments,
    )


class _Sequence:
    __slots__ = ("_hidden_ids", "detokenizer", "is_finished", "newest", "push")

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, marks: Mapping[int, str] | None
    ) -> None:
        params = request.params
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params, marks)
        self.push = None if self.detokenizer is None else self.detokenizer.push
        """Of the detokenizer, where it has one."""
        self.newest: OutputDelta | None = None
        """What was told of it last, if that may still grow."""
        self._hidden_ids: tuple[int, ...] = ()
        if not params.include_stop_str_in_output:
            eos = () if params.ignore_eos else request.eos_token_ids
            self._hidden_ids = (*eos, *params.stop_token_ids)
        self.is_finished = False

    def hides(self, token_id: int) -> bool:
        """Whether the last token is no text: the end itself. That of a grammar's whole text is."""
        return token_id in self._hidden_ids


class _Open:
    """A request that has not ended."""

    __slots__ = ("has_begun", "num_running", "receiver", "sequences")

    def __init__(
        self,
        request: Request,
        receiver: Receiver,
        tokenizer: Tokenizer | None,
        marks: Mapping[int, str] | None,
    ) -> None:
        self.receiver = receiver
        self.sequences = [_Sequence(request, tokenizer, marks) for _ in range(request.params.n)]
        self.num_running = request.params.n
        self.has_begun = False
        """Whether anything of it was told."""
