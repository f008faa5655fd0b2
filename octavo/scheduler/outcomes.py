"""What becomes of steps that were launched: their tokens, or what is done when they raised.

Called by the scheduler. Decides no step; whose tokens count, whose pages are published and who ends
is decided here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from octavo.kv_cache.manager import KVCacheManager
from octavo.request import FinishReason, TokenDelta
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.finish import finish_reason, stop_reason, token_delta
from octavo.scheduler.queues import Queues
from octavo.scheduler.sequence import Sequence
from octavo.step import (
    NO_TOKEN,
    Bool,
    Float32,
    Int32,
    Purpose,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

MAX_LOSSES = 3
"""Times that a sequence is computed again, without a new token, because a step of it alone found no
memory."""
PUBLISHED_AT_ONCE = 8
"""Full blocks of a running answer that others find together, at less cost than one by one. Those of
prompts they find at once, and all when it ends or is preempted."""
BROKEN_LOGITS = "the logits hold a NaN or nothing finite: the weights, or this KV, are broken"
BROKEN_STATES = "the vector holds a NaN or an infinity: the weights, or this KV, are broken"


# An enumeration's members are looked up slowly.
_NONE, _TOKEN, _VECTOR = Purpose.NONE, Purpose.TOKEN, Purpose.VECTOR


@dataclass(slots=True)
class Launched:
    """A step between schedule and commit."""

    sequences: list[Sequence]
    plan: StepPlan
    holders: NDArray[np.int64]
    """Of the plan's rows: whether a row still has the same holder."""
    computed: Int32
    """Tokens of each that are computed when the step is over."""
    is_lost: bool = False
    """It, or one that it may build on, did not run: its sequences are computed again, or ended."""

    def unfinished(self) -> dict[Sequence, int]:
        """Returns its sequences that have not ended since, and the tokens it computed of each."""
        pairs = zip(self.sequences, self.computed.tolist(), strict=True)
        return {sequence: count for sequence, count in pairs if not sequence.is_finished}


def _end_prefill(sequence: Sequence, start: int) -> None:
    """A chunk of a traced sequence from token `start` on is computed."""
    for moment in sequence.moments or ():
        if moment.kind == "prefill" and not moment.end and moment.first == start:
            moment.end = time.monotonic()


class Outcomes:
    """Steps between schedule and commit, and what comes of them."""

    def __init__(
        self,
        queues: Queues,
        manager: KVCacheManager,
        counters: SchedulerCounters,
        few_rows: int,
    ) -> None:
        """Steps of `few_rows` rows and fewer are committed row by row."""
        self._few_rows = few_rows
        # Where blocks are given back while a sequence runs, they are kept until others find them;
        # who is told what can be found is told at once.
        is_eager = manager.has_bounds or manager.has_states or manager.has_news
        self._published_at_once = 1 if is_eager else PUBLISHED_AT_ONCE
        self._queues = queues
        self._manager = manager
        self._counters = counters
        self._launched: dict[int, Launched] = {}

    def __len__(self) -> int:
        """Steps that are on their way."""
        return len(self._launched)

    def launch(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """A step of `sequences` goes to the runner."""
        holders = self._queues.rows.holders[plan.rows]
        computed = plan.starts + plan.query_lens
        self._launched[plan.step_id] = Launched(sequences, plan, holders, computed)

    def prepare(self, plan: StepPlan) -> None:
        """Does what the commit of a launched step can have done while the device works."""
        for start in plan.row_starts:
            sequence = self._queues.rows.sequences.item(start.row)
            if sequence is not None:
                self._manager.digest(sequence.kv, sequence.token_ids)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes over what a step produced: appends, finishes, frees, publishes block digests."""
        step = self._launched.pop(plan.step_id)
        self._counters.num_splits += result.num_splits
        if step.is_lost:
            return []
        is_few = plan.num_rows <= self._few_rows
        deltas = (self._commit_few if is_few else self._commit_many)(step, result)
        if self._queues.suspects:
            for sequence, count in zip(step.sequences, step.computed.tolist(), strict=True):
                self._queues.suspects.clear(sequence, count)
        return deltas

    def _commit_few(self, step: Launched, result: StepResult) -> list[TokenDelta]:
        """As `_commit_many`, row by row."""
        deltas: list[TokenDelta] = []
        rows, holders = step.plan.rows.tolist(), step.holders.tolist()
        for i, (row, holder) in enumerate(zip(rows, holders, strict=True)):
            if step.sequences[i].is_finished:
                continue
            is_kept = self._queues.rows.holders.item(row) == holder
            delta = self._commit_one(step, i, result, is_kept)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _commit_many(self, step: Launched, result: StepResult) -> list[TokenDelta]:
        """Takes over what a step produced, that of plain rows with a token all at once."""
        rows, tokens = step.plan.rows, np.full(step.plan.num_rows, NO_TOKEN, np.int32)
        is_single = np.diff(result.token_starts) == 1
        tokens[is_single] = result.token_ids[result.token_starts[:-1][is_single]]
        there, kept = self._queues.rows, self._manager.rows
        is_kept = there.holders[rows] == step.holders
        is_plain = is_kept & there.is_plain[rows] & (tokens != NO_TOKEN)
        known = there.known[rows]
        is_first = is_plain & (known == there.prompt_lens[rows])
        may_end = (known + 1 >= there.max_lens[rows]) | there.end_with(rows, tokens)
        there.committed[rows[is_plain]] = step.computed[is_plain]
        told = self._tell_all(rows[is_plain], tokens[is_plain])
        for i in is_first.nonzero()[0].tolist():
            self._count_prompt(step.sequences[i])
        self._end_all(step, is_plain, is_plain & may_end, told)
        num_due = kept.num_published[rows] + np.where(is_first, 1, self._published_at_once)
        is_due = there.writes_cache[rows] & (step.computed // self._manager.block_size >= num_due)
        deltas: list[TokenDelta] = []
        done, num_told = 0, np.cumsum(is_plain).tolist()
        for i in np.flatnonzero(is_due | ~is_plain).tolist():
            sequence = step.sequences[i]
            if sequence.is_finished:
                continue
            if is_plain[i]:
                self._queues.publish(sequence)
                continue
            delta = self._commit_one(step, i, result, is_kept.item(i))
            if delta is not None:
                deltas += told[done : num_told[i]]
                deltas.append(delta)
                done = num_told[i]
        return deltas + told[done:]

    def _end_all(
        self, step: Launched, is_plain: Bool, may_end: Bool, told: list[TokenDelta]
    ) -> None:
        """Ends those of a step's plain rows whose newest token is their last, and says so in the
        news of them; of others than those that `may_end` it never is."""
        ended: list[Sequence] = []
        places = np.cumsum(is_plain) - 1
        for i in may_end.nonzero()[0].tolist():
            sequence = step.sequences[i]
            reason = finish_reason(sequence)
            if reason is not None:
                stop, place = stop_reason(sequence, reason), places.item(i)
                told[place] = token_delta(sequence, told[place].token_ids, reason, stop=stop)
                ended.append(sequence)
        self._queues.finish(ended)

    def _tell_all(self, rows: Int32, tokens: Int32) -> list[TokenDelta]:
        """Appends a token to each of the rows; returns the news of them."""
        there = self._queues.rows
        there.known[rows] += 1
        there.pending[rows] -= 1
        self._counters.num_generation_tokens += len(rows)
        ids = tokens.tolist()
        for token_ids, token in zip(there.token_ids[rows].tolist(), ids, strict=True):
            token_ids.append(token)
        return list(
            map(
                TokenDelta,
                there.request_ids[rows].tolist(),
                there.indices[rows].tolist(),
                zip(ids, strict=True),
                there.num_cached_tokens[rows].tolist(),
                there.scheduled_times[rows].tolist(),
            )
        )

    def _commit_one(
        self, step: Launched, i: int, result: StepResult, is_kept: bool
    ) -> TokenDelta | None:
        """Takes over what row `i` of a step came to; returns the news of its sequence, which has
        not ended. `is_kept`: it still has the row."""
        sequence, start = step.sequences[i], step.plan.starts.item(i)
        purpose, known, first = step.plan.purposes.item(i), len(sequence.token_ids), 0
        if sequence.moments:
            _end_prefill(sequence, start)
        if i in result.prompt_logprobs:
            self._keep_prompt_logprobs(sequence, start, result.prompt_logprobs[i])
        if purpose != _NONE:
            sequence.num_pending -= 1
            first, end = result.token_starts[i : i + 2].tolist()
            error = self._append(sequence, result.token_ids[first:end].tolist())
            if purpose == _VECTOR and not np.isfinite(result.vectors[i]).all():
                error = BROKEN_STATES
            if error is not None:
                return self._fail(sequence, error)
        if is_kept:
            computed = step.computed.item(i)
            self._queues.rows.committed[sequence.row] = computed
            if computed // self._manager.block_size > sequence.kv.num_published:
                self._queues.publish(sequence)
        if purpose == _TOKEN:
            return self._tell(sequence, known, result, first)
        if purpose == _VECTOR:
            return self._end_with(sequence, result.vectors[i])
        return None

    def _append(self, sequence: Sequence, token_ids: list[int]) -> str | None:
        """Appends a row's tokens as far as the sequence goes; returns what is wrong with one."""
        for token in token_ids:
            if token == NO_TOKEN:
                # A form that cannot go on leaves no token either: then the weights are sound.
                return (sequence.guide and sequence.guide.error) or BROKEN_LOGITS
            if sequence.guide is not None:
                sequence.guide.advance(token)
                if sequence.guide.error:
                    return sequence.guide.error
            sequence.append(token)
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
        tokens = tuple(sequence.token_ids[known:])
        places = range(first, first + len(tokens))
        logprobs = [result.logprobs[place] for place in places if place in result.logprobs]
        stop = stop_reason(sequence, reason)
        delta = token_delta(sequence, tokens, reason, logprobs=logprobs, stop=stop)
        if reason is not None:
            self._queues.finish([sequence])
        return delta

    def _end_with(self, sequence: Sequence, vector: Float32) -> TokenDelta:
        """Ends a sequence that wanted its vector."""
        self._count_prompt(sequence)
        delta = token_delta(sequence, (), FinishReason.STOP, vector=vector.tobytes())
        self._queues.finish([sequence])
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
            return replace(step, sequences=[], computed=step.computed[:0])
        for lost in (step, *self._launched.values()):
            lost.is_lost = True
            for sequence in lost.sequences:
                sequence.num_pending = 0
                if sequence.row is not None:
                    self._queues.preempt(sequence)
        return step

    def _fail(self, sequence: Sequence, message: str) -> TokenDelta:
        """Ends one sequence with an error; nothing of its newest step is published."""
        self._queues.finish([sequence])
        return token_delta(sequence, (), FinishReason.ERROR, stop=message)
