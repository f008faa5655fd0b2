"""What becomes of steps that were launched: their tokens, or what is done when they raised.

Called by the scheduler. Decides no step; whose tokens count, whose pages are published and who ends
is decided here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from octavo.kv_cache.manager import KVCacheManager
from octavo.request import FinishReason, TokenDelta
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.finish import finish_reason, stop_reason, token_delta
from octavo.scheduler.plan_builder import PlanBuilder
from octavo.scheduler.queues import Queues
from octavo.scheduler.sequence import Sequence
from octavo.step import NO_TOKEN, Float32, Purpose, StepPlan, StepResult, TokenLogprobs

MAX_LOSSES = 3
"""Times that a sequence is computed again, without a new token, because a step of it alone found no
memory."""
BROKEN_LOGITS = "the logits hold a NaN or nothing finite: the weights, or this KV, are broken"
BROKEN_STATES = "the vector holds a NaN or an infinity: the weights, or this KV, are broken"


@dataclass(slots=True)
class Launched:
    """A step between schedule and commit. Epochs tell whether a row is still the same holder."""

    sequences: list[Sequence]
    purposes: list[Purpose]
    computed: list[int]
    preemptions: list[int]
    is_lost: bool = False
    """It, or one that it may build on, did not run: its sequences are computed again, or ended."""

    def unfinished(self) -> dict[Sequence, int]:
        """Returns its sequences that have not ended since, and the tokens it computed of each."""
        pairs = zip(self.sequences, self.computed, strict=True)
        return {sequence: count for sequence, count in pairs if not sequence.is_finished}


def _end_prefill(sequence: Sequence, start: int) -> None:
    """A chunk of a traced sequence from token `start` on is computed."""
    for moment in sequence.moments or ():
        if moment.kind == "prefill" and not moment.end and moment.first == start:
            moment.end = time.monotonic()


class Outcomes:
    """Steps between schedule and commit, and what comes of them."""

    def __init__(
        self, queues: Queues, manager: KVCacheManager, counters: SchedulerCounters
    ) -> None:
        self._queues = queues
        self._manager = manager
        self._counters = counters
        self._launched: dict[int, Launched] = {}

    def __len__(self) -> int:
        """Steps that are on their way."""
        return len(self._launched)

    def launch(self, step_id: int, builder: PlanBuilder) -> None:
        """A step goes to the runner."""
        self._launched[step_id] = Launched(
            builder.sequences,
            builder.purposes,
            builder.computed(),
            [sequence.num_preemptions for sequence in builder.sequences],
        )

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes over what a step produced: appends, finishes, frees, publishes block digests."""
        step = self._launched.pop(plan.step_id)
        self._counters.num_splits += result.num_splits
        if step.is_lost:
            return []
        token_ids, starts = result.token_ids.tolist(), result.token_starts.tolist()
        block_size, prompt_logprobs = self._manager.block_size, result.prompt_logprobs
        deltas: list[TokenDelta] = []
        rows = zip(step.sequences, step.purposes, step.computed, step.preemptions, strict=True)
        for i, (sequence, purpose, computed, num_preemptions) in enumerate(rows):
            if sequence.is_finished:
                continue
            known = len(sequence.token_ids)
            if sequence.moments:
                _end_prefill(sequence, int(plan.starts[i]))
            if prompt_logprobs and i in prompt_logprobs:
                self._keep_prompt_logprobs(sequence, int(plan.starts[i]), prompt_logprobs[i])
            if purpose is not Purpose.NONE:
                sequence.num_pending -= 1
                first, end, error = starts[i], starts[i + 1], None
                if end == first + 1 and sequence.guide is None and token_ids[first] != NO_TOKEN:
                    sequence.token_ids.append(token_ids[first])  # nearly always
                else:
                    error = self._append(sequence, token_ids[first:end])
                if purpose is Purpose.VECTOR and not np.isfinite(result.vectors[i]).all():
                    error = BROKEN_STATES
                if error is not None:
                    deltas.append(self._fail(sequence, error))
                    continue
            is_block_full = computed // block_size > sequence.kv.num_published
            if is_block_full and sequence.num_preemptions == num_preemptions:
                self._manager.publish(sequence.kv, sequence.token_ids, computed)
            if purpose is Purpose.TOKEN:
                deltas.append(self._tell(sequence, known, result, starts[i]))
            elif purpose is Purpose.VECTOR:
                deltas.append(self._end_with(sequence, result.vectors[i]))
        if self._queues.suspects:
            for sequence, computed in zip(step.sequences, step.computed, strict=True):
                self._queues.suspects.clear(sequence, computed)
        return deltas

    def _append(self, sequence: Sequence, token_ids: list[int]) -> str | None:
        """Appends a row's tokens as far as the sequence goes; returns what is wrong with one."""
        for token in token_ids:
            if token == NO_TOKEN:
                return BROKEN_LOGITS
            if sequence.guide is not None:
                sequence.guide.advance(token)
                if sequence.guide.error:
                    return sequence.guide.error
            sequence.token_ids.append(token)
            if len(token_ids) > 1 and finish_reason(sequence) is not None:
                break
        return None

    def _keep_prompt_logprobs(
        self, sequence: Sequence, start: int, logprobs: tuple[TokenLogprobs, ...]
    ) -> None:
        if sequence.prompt_logprobs is not None:
            del sequence.prompt_logprobs[start:]  # a preempted prefill comes again
            sequence.prompt_logprobs.extend(logprobs)

    def _tell(self, sequence: Sequence, known: int, result: StepResult, first: int) -> TokenDelta:
        """Counts the tokens behind the `known` ones, ends the sequence if the newest is its last,
        and words the news; `first` is where they begin among the result's."""
        token = sequence.token_ids[-1]
        length = len(sequence.token_ids)
        self._counters.num_generation_tokens += length - known
        reason = None
        if length >= sequence.max_len or token in sequence.stop_ids or sequence.guide is not None:
            reason = finish_reason(sequence)
        if known == sequence.prompt_len:
            self._count_prompt(sequence)
        elif (
            reason is None
            and length == known + 1
            and first not in result.logprobs
            and not sequence.moments
        ):
            # nearly always
            return TokenDelta(
                request_id=sequence.request.request_id,
                index=sequence.index,
                token_ids=(token,),
                num_cached_tokens=sequence.num_cached_tokens,
                scheduled_time=sequence.scheduled_time,
            )
        tokens = tuple(sequence.token_ids[known:])
        places = range(first, first + len(tokens))
        logprobs = [result.logprobs[place] for place in places if place in result.logprobs]
        stop = stop_reason(sequence, reason)
        delta = token_delta(sequence, tokens, reason, logprobs=logprobs, stop=stop)
        if reason is not None:
            self._queues.finish(sequence)
        return delta

    def _end_with(self, sequence: Sequence, vector: Float32) -> TokenDelta:
        """Ends a sequence that wanted its vector."""
        self._count_prompt(sequence)
        delta = token_delta(sequence, (), FinishReason.STOP, vector=vector.tobytes())
        self._queues.finish(sequence)
        return delta

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.index == 0:
            self._counters.num_prompt_tokens += sequence.prompt_len
            self._counters.num_cached_prompt_tokens += sequence.num_cached_tokens

    def masked(self, plan: StepPlan) -> list[Sequence]:
        """Returns the sequences of a launched step's masked rows, in their order."""
        sequences = self._launched[plan.step_id].sequences
        places = [] if plan.masked is None else plan.masked.nonzero()[0].tolist()
        return [sequences[place] for place in places]

    def is_lost(self, plan: StepPlan) -> bool:
        """Whether a launched step counts for nothing any more, since one before it raised."""
        return self._launched[plan.step_id].is_lost

    def fail(self, plan: StepPlan, message: str) -> list[TokenDelta]:
        """A step raised: a sequence that was alone in it ends with an error; several are computed
        again apart."""
        return self._blame(self._drop(plan), message, patience=0)

    def lose(self, plan: StepPlan, message: str) -> list[TokenDelta]:
        """A step found no memory: as `fail`, but a sequence alone ends only after MAX_LOSSES times
        without a new token."""
        step = self._drop(plan)
        self._counters.num_lost_steps += bool(step.sequences)
        return self._blame(step, message, patience=MAX_LOSSES)

    def _blame(self, step: Launched, message: str, patience: int) -> list[TokenDelta]:
        unfinished = step.unfinished()
        if len(step.sequences) == 1:
            for sequence in unfinished:
                length = len(sequence.token_ids)
                sequence.lost_at.append(length)
                if sequence.lost_at.count(length) > patience:
                    return [self._fail(sequence, message)]
        if unfinished:
            self._queues.suspects.accuse(unfinished)
        return []

    def _drop(self, plan: StepPlan) -> Launched:
        """Takes back a step that wrote nothing to rely on; returns it, without sequences if an
        earlier one took it along.

        Steps launched since then may read what it has not written (a sample forked from its prompt
        does): they are lost with it, and their sequences are computed again.
        """
        step = self._launched.pop(plan.step_id)
        if step.is_lost:
            return Launched([], [], [], [])
        for lost in (step, *self._launched.values()):
            lost.is_lost = True
            for sequence in lost.sequences:
                sequence.num_pending = 0
                if sequence.row is not None:
                    self._queues.preempt(sequence)
        return step

    def _fail(self, sequence: Sequence, message: str) -> TokenDelta:
        """Ends one sequence with an error; nothing of its newest step is published."""
        self._queues.finish(sequence)
        return token_delta(sequence, (), FinishReason.ERROR, stop=message)
