"""Decides what every step computes and what becomes of its tokens. Pure Python; no torch.

Called by the engine core: add, abort, schedule -> launch -> collect -> commit. Runs one step ahead
of the device: between schedule(n + 1) and commit(n) a sequence's newest token is known to the
device only.

Order: first come first served inside a priority. Running sequences first; decodes are sure of
their token, prefill chunks share what the token budget leaves, or what keeps the decodes' pace. A
sequence whose next block another one is computing waits for it. When memory runs out, the youngest
running sequence gives up its blocks and comes back first; the oldest always proceeds, so nothing
starves. A step that raised counts for nothing: its sequences are computed again apart, and who
raises alone ends.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.errors import OverloadedError
from octavo.kv_cache.manager import KVCacheManager, PrefixHit, SequenceKV
from octavo.request import FinishReason, Request, TokenDelta
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.finish import finish_reason, stop_reason, token_delta
from octavo.scheduler.forecast import Forecast, Growing
from octavo.scheduler.pace import Pace
from octavo.scheduler.plan_builder import PlanBuilder
from octavo.scheduler.sequence import Sequence
from octavo.scheduler.suspects import Suspects
from octavo.step import NO_TOKEN, StepPlan, StepResult, TokenLogprobs

MAX_LOSSES = 3
"""Times that a sequence is computed again, without a new token, because a step of it alone found no
memory."""
BROKEN_LOGITS = "the logits hold a NaN or nothing finite: the weights, or this KV, are broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one step and the queue may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_queued_requests: int = 4096
    headroom_tokens: int = 0
    """A sequence is admitted only where it and all that run can go on for so many steps, those that
    reach their limit giving back their blocks: taking blocks away and computing them again costs
    more than waiting for the next to finish."""


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


@dataclass(slots=True)
class _Launched:
    """A step between schedule and commit. Epochs tell whether a row is still the same holder."""

    sequences: list[Sequence]
    samples: list[bool]
    computed: list[int]
    preemptions: list[int]
    is_lost: bool = False
    """It, or one that it may build on, did not run: its sequences are computed again, or ended."""

    def unfinished(self) -> dict[Sequence, int]:
        """Returns its sequences that have not ended since, and the tokens it computed of each."""
        pairs = zip(self.sequences, self.computed, strict=True)
        return {sequence: count for sequence, count in pairs if not sequence.is_finished}


class Scheduler:
    """Queues of sequences; `waiting` and `running` are kept in order of priority and arrival."""

    def __init__(
        self, manager: KVCacheManager, limits: SchedulerLimits, pace: Pace | None = None
    ) -> None:
        """`pace` bounds the prompt tokens of a step; None: only `limits` does."""
        self.manager = manager
        self._pace = pace
        self.limits = limits
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._launched: dict[int, _Launched] = {}
        self._suspects = Suspects()
        self._has_prefills = False
        """Whether a running sequence may have more than one token to compute."""
        self._next_order = 0
        self._next_step = 0

    # -- requests ----------------------------------------------------------------------------

    def add(self, request: Request, root: bytes, caching: bool, seeds: Iterable[int]) -> None:
        """Queues a request's sequences, one per seed. Raises OverloadedError if the queue is full.

        `root` is the parent digest of its first block; `caching` whether it uses the prefix cache.
        """
        limit = self.limits.max_num_queued_requests
        if len(self.waiting) >= limit:
            raise OverloadedError(f"{len(self.waiting)} requests wait already (limit {limit})")
        full_blocks = request.prompt_len // self.manager.block_size
        sequences = []
        for index, seed in enumerate(seeds):
            kv = SequenceKV(
                root=root,
                # A hit has no logits, so prompt log-probabilities must be computed.
                reads_cache=caching and request.params.prompt_logprobs is None,
                writes_cache=caching,
                prompt_blocks=full_blocks,
            )
            sequence = Sequence(
                request,
                index,
                kv,
                seed=seed,
                order=self._next_order,
                max_len=self.limits.max_model_len,
            )
            self._next_order += 1
            sequences.append(sequence)
            insort(self.waiting, sequence, key=_order)
        self._requests[request.request_id] = sequences

    def abort(self, request_id: str, index: int | None = None) -> list[TokenDelta]:
        """Ends a request, or one of its sequences, now: its blocks are free for the next step.

        Unknown and finished ones are ignored, since an abort may cross the last token.
        """
        deltas = []
        for sequence in list(self._requests.get(request_id, ())):
            if index in (None, sequence.index) and not sequence.is_finished:
                self._finish(sequence)
                deltas.append(token_delta(sequence, (), FinishReason.ABORT))
        return deltas

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    # -- schedule ----------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Returns the next step, or None if nothing can be computed before a commit."""
        began = time.perf_counter()
        builder = PlanBuilder(self._max_step_tokens())
        if self._suspects:
            if self._launched:
                return None  # whose fault it is, the step under way will tell
            self._schedule_suspects(builder)
        elif not self._schedule_running(builder) and self.waiting:
            self._schedule_waiting(builder)
        if builder.is_empty:
            return None
        step_id = self._next_step
        self._next_step += 1
        freed_rows, self._freed_rows = tuple(self._freed_rows), []
        plan = builder.build(step_id, freed_rows, self.manager)
        self._launched[step_id] = _Launched(
            builder.sequences,
            builder.samples,
            builder.computed(),
            [sequence.num_preemptions for sequence in builder.sequences],
        )
        self.counters.count_step(plan.num_tokens, time.perf_counter() - began)
        return plan

    def _max_step_tokens(self) -> int:
        """Returns how many tokens the next step may compute, its decodes always among them."""
        most = self.limits.max_num_batched_tokens
        has_prefills = self._has_prefills or self.waiting
        if self._pace is None or not has_prefills or self._suspects:
            return most
        num_decodes = self._num_decodes()
        num_prompts = len(self.running) - num_decodes + len(self.waiting)
        budget = self._pace.prefill_budget(num_decodes, num_prompts)
        return most if budget is None else min(most, num_decodes + budget)

    def _schedule_running(self, builder: PlanBuilder) -> bool:
        """Gives every running sequence its tokens; returns whether one was preempted for it."""
        running = self.running
        prefill_budget = builder.max_tokens - self._num_decodes()
        self._has_prefills = was_preempted = False
        position = 0
        # The list shrinks from its end while it is walked: victims are the youngest.
        while position < len(running):
            sequence = running[position]
            position += 1
            num_pending = sequence.num_pending
            num_tokens = len(sequence.token_ids) + num_pending
            if num_pending and num_tokens >= sequence.max_len:
                continue  # its last token is on its way
            start = sequence.num_computed
            count = num_tokens - start
            if count != 1:
                self._has_prefills = True
                count = min(count, prefill_budget)
                prefill_budget -= count
                if count <= 0:
                    continue
            if start + count > sequence.kv.capacity:
                was_preempted |= self._make_room(sequence, start + count)
                if sequence.row is None:
                    continue
            if count == 1 and num_pending:
                builder.add_next(sequence)
            else:
                builder.add(sequence, count)
        return was_preempted

    def _num_decodes(self) -> int:
        """Running sequences that compute one token; counted only while some compute more."""
        if not self._has_prefills:
            return len(self.running)
        return sum(len(s.token_ids) + s.num_pending - s.num_computed == 1 for s in self.running)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates blocks for `num_tokens`, preempting the youngest while there are too few,
        in the end `sequence` itself; returns whether anyone was preempted."""
        was_preempted = False
        while not self.manager.allocate(sequence.kv, sequence.num_computed, num_tokens):
            was_preempted = True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                break
        return was_preempted

    def _preempt(self, sequence: Sequence) -> None:
        """Takes blocks and row away; what it published stays cached while nobody needs the room."""
        self.running.remove(sequence)
        sequence.num_preemptions += 1
        sequence.num_recomputed += sequence.num_computed
        sequence.num_computed = 0
        self._release(sequence)
        insort(self.waiting, sequence, key=_order)
        self.counters.num_preemptions += 1

    def _schedule_waiting(self, builder: PlanBuilder) -> None:
        """Admits waiting sequences in order while rows, budget and blocks last."""
        forecast = self._forecast()
        position = 0
        while position < len(self.waiting):
            budget = self._admission_budget(builder)
            if not budget:
                return
            sequence = self.waiting[position]
            if self._must_wait(sequence, builder):
                position += 1
                continue
            count = self._fork(sequence) or self._admit(sequence, budget, forecast)
            if count is None:
                return
            if count == 0:
                position += 1
                continue
            del self.waiting[position]
            self._join(sequence, count, builder, forecast)

    def _admission_budget(self, builder: PlanBuilder) -> int:
        """Returns the tokens that a sequence may begin with in this step, 0 if none may."""
        most = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        if not self._free_rows or len(self.running) >= most:
            return 0
        return builder.room

    def _join(
        self, sequence: Sequence, count: int, builder: PlanBuilder, forecast: Forecast
    ) -> None:
        """An admitted sequence runs from this step on, which computes `count` tokens of it."""
        insort(self.running, sequence, key=_order)
        forecast.add((self._growing(sequence),))
        self._has_prefills = True
        builder.start_row(sequence)
        builder.add(sequence, count)

    def _schedule_suspects(self, builder: PlanBuilder) -> None:
        """Computes suspects with nobody beside them. The others give up their blocks, so that there
        is room for suspects, and what they announced, so that no suspect waits for them."""
        group = self._suspects.group
        for sequence in [s for s in self.running if s not in group]:
            self._preempt(sequence)
        if self._schedule_running(builder):
            return
        forecast = self._forecast()
        for sequence in [s for s in self.waiting if s in group]:
            budget = self._admission_budget(builder)
            count = self._admit(sequence, budget, forecast) if budget else None
            if count is None:
                return
            if count:
                self.waiting.remove(sequence)
                self._join(sequence, count, builder, forecast)

    def _forecast(self) -> Forecast:
        """Returns what the running sequences will need, the rest of their prompts included."""
        manager = self.manager
        forecast = Forecast(self.limits.headroom_tokens, manager.block_size, len(manager.tables))
        held = [sequence.kv.capacity // manager.block_size for sequence in self.running]
        forecast.add(map(self._growing, self.running, held))
        forecast.share(manager.pool.num_referenced, sum(held))
        return forecast

    def _growing(self, sequence: Sequence, num_held: int = 0) -> Growing:
        """What has just been admitted gives nothing back, as far as the forecast cares: what of it
        is shared is known a step later. What one that waits lacks now, its admission counts."""
        num_tokens, size = sequence.num_tokens, self.manager.block_size
        missing = (
            0 if sequence.row is None else -(-num_tokens // size) - sequence.kv.capacity // size
        )
        return Growing(num_tokens, sequence.max_len - num_tokens, max(missing, 0), num_held)

    def _must_wait(self, sequence: Sequence, builder: PlanBuilder) -> bool:
        """Whether it would do twice what somebody is doing for it."""
        if sequence.num_pending:
            return True  # preempted, and its newest token is still on the way
        leader = self._leader(sequence)
        if leader is None:
            return False
        # Blocks are copied before a step computes: the prompt must be of an earlier one.
        return leader.num_computed < leader.prompt_len or leader in builder.prefilling

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """The first sample of the same request, if this one can still take its prompt over."""
        if sequence.index == 0 or sequence.num_outputs:
            return None
        leader = self._requests[sequence.request.request_id][0]
        return None if leader.is_finished else leader

    def _fork(self, sequence: Sequence) -> int | None:
        """Starts a parallel sample from its leader's blocks; returns 1, the prompt's last token,
        whose logits it needs; None if that cannot be."""
        leader = self._leader(sequence)
        if leader is None or leader.row is None:
            return None
        computed = leader.prompt_len - 1
        if not self.manager.fork(leader.kv, sequence.kv, self._free_rows[-1], computed):
            return None
        sequence.num_cached_tokens = leader.num_cached_tokens
        self._start(sequence, computed)
        return 1

    def _admit(self, sequence: Sequence, budget: int, forecast: Forecast) -> int | None:
        """Starts a sequence; returns how many tokens it computes now, 0 if it should wait for a
        prefix, None if there is no room for it."""
        manager = self.manager
        hit = manager.lookup(sequence.kv, sequence.token_ids)
        if hit.is_computing:
            return 0
        cached = hit.num_blocks * manager.block_size
        needed = manager.blocks_for(sequence.num_tokens, budget)
        needed -= hit.num_blocks * len(manager.tables)
        room = manager.room(hit) - needed
        # Alone it may take all there is: it fits by its limit.
        if room < 0 or (self.running and not forecast.fits(self._growing(sequence), room)):
            return None
        count = min(sequence.num_tokens - cached, budget)
        if not manager.admit(sequence.kv, self._free_rows[-1], hit, cached + count):
            return None
        self._count_lookup(sequence, hit)
        self._start(sequence, cached)
        return count

    def _count_lookup(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Only the first admission is a query: recomputing after preemption is not a hit."""
        size = self.manager.block_size
        cached = hit.num_blocks * size
        if sequence.num_preemptions:
            lost = sequence.num_recomputed - cached
            self.counters.num_recomputed_tokens += max(lost, 0)
            sequence.num_recomputed = 0
            return
        sequence.num_cached_tokens = cached
        if sequence.kv.reads_cache:
            length = sequence.prompt_len
            cacheable = (length - 1) // size * size
            self.counters.count_lookup(length, cached, cacheable, hit.miss_reason)

    def _start(self, sequence: Sequence, num_computed: int) -> None:
        sequence.row = self._free_rows.pop()
        sequence.num_computed = num_computed
        if sequence.scheduled_time is None:
            sequence.scheduled_time = time.monotonic()

    # -- commit ------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes over a step's tokens: appends, finishes, frees, publishes block digests."""
        step = self._launched.pop(plan.step_id)
        self.counters.num_splits += result.num_splits
        if step.is_lost:
            return []
        token_ids = result.token_ids.tolist()
        block_size = self.manager.block_size
        deltas: list[TokenDelta] = []
        sample = 0
        for i, sequence in enumerate(step.sequences):
            is_sampling = step.samples[i]
            sample += is_sampling
            if sequence.is_finished:
                continue
            if i in result.prompt_logprobs:
                self._keep_prompt_logprobs(sequence, int(plan.starts[i]), result.prompt_logprobs[i])
            if is_sampling:
                if token_ids[sample - 1] == NO_TOKEN:
                    deltas.append(self._fail(sequence, BROKEN_LOGITS))
                    continue
                sequence.num_pending -= 1
                sequence.token_ids.append(token_ids[sample - 1])
            is_block_full = step.computed[i] // block_size > sequence.kv.num_published
            if is_block_full and sequence.num_preemptions == step.preemptions[i]:
                self.manager.publish(sequence.kv, sequence.token_ids, step.computed[i])
            if is_sampling:
                deltas.append(self._tell(sequence, result.logprobs.get(sample - 1)))
        if self._suspects:
            for sequence, computed in zip(step.sequences, step.computed, strict=True):
                self._suspects.clear(sequence, computed)
        return deltas

    def _keep_prompt_logprobs(
        self, sequence: Sequence, start: int, logprobs: tuple[TokenLogprobs, ...]
    ) -> None:
        if sequence.prompt_logprobs is not None:
            del sequence.prompt_logprobs[start:]  # a preempted prefill comes again
            sequence.prompt_logprobs.extend(logprobs)

    def _tell(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> TokenDelta:
        """Counts the newest token, ends the sequence if it is its last, and words the news."""
        token = sequence.token_ids[-1]
        length = len(sequence.token_ids)
        self.counters.num_generation_tokens += 1
        reason = None
        if length >= sequence.max_len or token in sequence.stop_ids:
            reason = finish_reason(sequence)
        if length == sequence.prompt_len + 1:
            self._count_prompt(sequence)
        elif reason is None and logprobs is None:  # most tokens of most requests
            return TokenDelta(
                request_id=sequence.request.request_id,
                index=sequence.index,
                token_ids=(token,),
                num_cached_tokens=sequence.num_cached_tokens,
                scheduled_time=sequence.scheduled_time,
            )
        stop = stop_reason(sequence, reason)
        delta = token_delta(sequence, (token,), reason, logprobs=logprobs, stop=stop)
        if reason is not None:
            self._finish(sequence)
        return delta

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.index == 0:
            self.counters.num_prompt_tokens += sequence.prompt_len
            self.counters.num_cached_prompt_tokens += sequence.num_cached_tokens

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
        self.counters.num_lost_steps += bool(step.sequences)
        return self._blame(step, message, patience=MAX_LOSSES)

    def _blame(self, step: _Launched, message: str, patience: int) -> list[TokenDelta]:
        unfinished = step.unfinished()
        if len(step.sequences) == 1:
            for sequence in unfinished:
                length = len(sequence.token_ids)
                sequence.lost_at.append(length)
                if sequence.lost_at.count(length) > patience:
                    return [self._fail(sequence, message)]
        if unfinished:
            self._suspects.accuse(unfinished)
        return []

    def _drop(self, plan: StepPlan) -> _Launched:
        """Takes back a step that wrote nothing to rely on; returns it, without sequences if an
        earlier one took it along.

        Steps launched since then may read what it has not written (a sample forked from its prompt
        does): they are lost with it, and their sequences are computed again.
        """
        step = self._launched.pop(plan.step_id)
        if step.is_lost:
            return _Launched([], [], [], [])
        for lost in (step, *self._launched.values()):
            lost.is_lost = True
            for sequence in lost.sequences:
                sequence.num_pending = 0
                if sequence.row is not None:
                    self._preempt(sequence)
        return step

    def _fail(self, sequence: Sequence, message: str) -> TokenDelta:
        """Ends one sequence with an error; nothing of its newest step is published."""
        self._finish(sequence)
        return token_delta(sequence, (), FinishReason.ERROR, stop=message)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.is_finished:
            return
        sequence.is_finished = True
        self._suspects.forget(sequence)
        queue = self.waiting if sequence.row is None else self.running
        queue.remove(sequence)
        self._release(sequence)
        siblings = self._requests[sequence.request.request_id]
        if all(s.is_finished for s in siblings):
            del self._requests[sequence.request.request_id]

    def _release(self, sequence: Sequence) -> None:
        self.manager.release(sequence.kv)
        if sequence.row is not None:
            self._freed_rows.append(sequence.row)
            self._free_rows.append(sequence.row)
            sequence.row = None

    # -- figures and checks ------------------------------------------------------------------

    @property
    def waste_share(self) -> float:
        """Slots of referenced blocks that hold no token, over all slots of referenced blocks."""
        manager = self.manager
        slots = manager.pool.num_referenced * manager.block_size
        unused = sum(s.kv.capacity - s.num_computed for s in self.running)
        return len(manager.tables) * unused / slots if slots else 0.0

    def check(self) -> None:
        """Raises AssertionError if queues, rows and blocks contradict each other."""
        rows = [s.row for s in self.running if s.row is not None]
        assert len(rows) == len(self.running)
        assert sorted(self._free_rows + rows) == list(range(self.limits.max_num_seqs))
        assert all(s.row is None and s.kv.row is None for s in self.waiting)
        assert all(s.kv.row == s.row for s in self.running)
        for s in self.running:
            self.manager.check_writable(s.kv, s.num_computed)
        self.manager.check(rows)
