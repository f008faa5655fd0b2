"""Owns the user's view of running requests: deltas from the core become texts and RequestOutputs.

Called by LLM and AsyncLLM after every step, in the process that speaks to the user. Says which
sequences a stop string has ended; never speaks to the core itself.

    add_request -> process (any number of times) -> finished: forgotten
                \\-> abort                        -> forgotten
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.engine.detokenizer import Detokenizer
from octavo.engine.tokenizer import Tokenizer
from octavo.request import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenDelta,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedOutputs:
    """What one round of deltas came to."""

    outputs: list[RequestOutput]
    """Of every request that changed, in order of its first delta. Their `outputs` go on growing
    with later rounds; `deltas` are this round's and stay as they are."""
    aborts: list[tuple[str, int]]
    """(request_id, index) of sequences that a stop string ended and the core still runs."""


class OutputProcessor:
    """Texts and outputs of all open requests. One owner calls it; not thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer, outputs have token ids and no text."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _Open] = {}

    def add_request(self, request: Request, prompt_text: str | None) -> None:
        """Opens a request; its id must not be open."""
        assert request.request_id not in self._requests, f"{request.request_id} is open already"
        tokenizer = self._tokenizer if request.params.detokenize else None
        sequences = [
            _Sequence(
                output=CompletionOutput(
                    index=index,
                    cumulative_logprob=None if request.params.logprobs is None else 0.0,
                    logprobs=None if request.params.logprobs is None else [],
                ),
                detokenizer=tokenizer and Detokenizer(tokenizer, request.params),
            )
            for index in range(request.params.n)
        ]
        self._requests[request.request_id] = _Open(
            request=request,
            prompt_text=prompt_text,
            sequences=sequences,
            metrics=RequestMetrics(arrival_time=request.arrival_time),
        )

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def process(self, deltas: Sequence[TokenDelta], now: float | None = None) -> ProcessedOutputs:
        """Takes one round of deltas at time `now` (of the clock of arrival times).

        Deltas of sequences that are unknown or ended here already are passed over: the core runs
        ahead, so a few always come.
        """
        changed: dict[str, list[CompletionOutput]] = {}
        aborts: list[tuple[str, int]] = []
        for delta in deltas:
            open_request = self._requests.get(delta.request_id)
            if open_request is None or not 0 <= delta.index < len(open_request.sequences):
                continue
            sequence = open_request.sequences[delta.index]
            if sequence.output.finish_reason is not None:
                continue
            self._note(open_request, delta, now)
            addition = self._advance(open_request, sequence, delta)
            if addition.finish_reason is not None and delta.finish_reason is None:
                aborts.append((delta.request_id, delta.index))
            changed.setdefault(delta.request_id, []).append(addition)
        outputs = [self._output(self._requests[key], added, now) for key, added in changed.items()]
        return ProcessedOutputs(outputs=outputs, aborts=aborts)

    def abort(self, request_id: str, now: float | None = None) -> RequestOutput | None:
        """Ends a request for its user; None if it is not open. The core must be told apart."""
        open_request = self._requests.get(request_id)
        if open_request is None:
            return None
        ends = (
            TokenDelta(request_id=request_id, index=index, finish_reason=FinishReason.ABORT)
            for index in range(len(open_request.sequences))
        )
        return self.process(list(ends), now).outputs[0]

    def _note(self, open_request: _Open, delta: TokenDelta, now: float | None) -> None:
        """Takes over what a delta says of the whole request."""
        metrics = open_request.metrics
        metrics.scheduled_time = metrics.scheduled_time or delta.scheduled_time
        if delta.token_ids and metrics.first_token_time is None:
            metrics.first_token_time = now
        cached = max(open_request.num_cached_tokens, delta.num_cached_tokens)
        open_request.num_cached_tokens = cached
        if delta.prompt_logprobs is not None:
            open_request.prompt_logprobs = [
                None if position is None else self._with_texts(position)
                for position in delta.prompt_logprobs
            ]

    def _advance(
        self, open_request: _Open, sequence: _Sequence, delta: TokenDelta
    ) -> CompletionOutput:
        """Adds a delta to its sequence and returns the addition."""
        token_ids, text = delta.token_ids, ""
        reason, stop_reason = delta.finish_reason, delta.stop_reason
        detokenizer = sequence.detokenizer
        if detokenizer is not None:
            shown = token_ids
            if reason == FinishReason.STOP and not (
                open_request.request.params.include_stop_str_in_output
            ):
                shown = token_ids[:-1]  # the stop id or EOS itself is no text
            text, stopped_by, num_tokens = detokenizer.update(shown)
            if stopped_by is not None:
                token_ids = token_ids[:num_tokens]
                reason, stop_reason = FinishReason.STOP, stopped_by
            elif reason is not None:
                text += detokenizer.finish()
        logprobs = [self._with_texts(position) for position in delta.logprobs[: len(token_ids)]]
        total = sequence.output
        addition = CompletionOutput(
            index=total.index,
            text=text,
            token_ids=list(token_ids),
            cumulative_logprob=total.cumulative_logprob,
            logprobs=None if total.logprobs is None else logprobs,
            finish_reason=None if reason is None else reason.value,
            stop_reason=stop_reason,
        )
        total.text += text
        total.token_ids += token_ids
        if total.logprobs is not None and total.cumulative_logprob is not None:
            total.logprobs += logprobs
            total.cumulative_logprob += sum(position[0].logprob for position in logprobs)
            addition.cumulative_logprob = total.cumulative_logprob
        total.finish_reason, total.stop_reason = addition.finish_reason, stop_reason
        return addition

    def _output(
        self, open_request: _Open, added: list[CompletionOutput], now: float | None
    ) -> RequestOutput:
        """Returns the request as it stands, and forgets it if it has ended."""
        request = open_request.request
        finished = all(s.output.finish_reason is not None for s in open_request.sequences)
        if finished:
            open_request.metrics.finished_time = now
            del self._requests[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            prompt=open_request.prompt_text,
            packed_prompt=request.packed_prompt,
            # The sequences themselves, which go on growing: a copy would cost their history.
            outputs=[sequence.output for sequence in open_request.sequences],
            finished=finished,
            prompt_logprobs=open_request.prompt_logprobs,
            num_cached_tokens=open_request.num_cached_tokens,
            metrics=open_request.metrics,
            deltas=added,
        )

    def _with_texts(self, position: PositionLogprobs) -> PositionLogprobs:
        if self._tokenizer is None:
            return position
        text = self._tokenizer.token_text
        return tuple(replace(entry, decoded_token=text(entry.token_id)) for entry in position)


@dataclass(slots=True, kw_only=True)
class _Sequence:
    output: CompletionOutput
    detokenizer: Detokenizer | None


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request that has not ended."""

    request: Request
    prompt_text: str | None
    sequences: list[_Sequence]
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
