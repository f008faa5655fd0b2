"""Decides what every step computes and what becomes of its tokens. Pure Python; no torch.

Called by the engine core: add, abort, schedule -> launch -> collect -> commit. Runs one step ahead
of the device: between schedule(n + 1) and commit(n) a sequence's newest token is known to the
device only.

Order: first come first served inside a priority. Running sequences first; decodes are sure of
their token, prefill chunks share what the token budget leaves, or what keeps the decodes' pace. A
sequence whose next block another one is computing waits for it. When memory runs out, the youngest
running sequence gives up its blocks and comes back first; the oldest always proceeds, or begins
again where nobody is in its way, so nothing starves. A step that raised counts for nothing: its
sequences are computed again apart, and who raises alone ends.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterable

import numpy as np

from octavo.errors import OverloadedError
from octavo.grammar import Guide
from octavo.kv_cache.explain import PrefixExplanation, explain
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.records import SequenceKV
from octavo.kv_cache.usage import waste_share
from octavo.request import FinishReason, Request, TokenDelta
from octavo.scheduler.admission import Admission, chunk_end
from octavo.scheduler.counters import SchedulerCounters
from octavo.scheduler.finish import token_delta
from octavo.scheduler.limits import SchedulerLimits
from octavo.scheduler.outcomes import Outcomes
from octavo.scheduler.pace import Pace
from octavo.scheduler.plan_builder import PlanBuilder
from octavo.scheduler.queues import Queues, prompt_of
from octavo.scheduler.rivals import Rivals
from octavo.scheduler.rows import FEW_ROWS
from octavo.scheduler.sequence import Sequence
from octavo.step import Int32, StepPlan, StepResult


class Scheduler:
    """The face of queues, admission and outcomes; plans what runs."""

    def __init__(
        self,
        manager: KVCacheManager,
        limits: SchedulerLimits,
        pace: Pace | None = None,
        few_rows: int = FEW_ROWS,
    ) -> None:
        """`pace` bounds the prompt tokens of a step; None: only `limits` does. Steps of `few_rows`
        rows and fewer are planned and committed row by row, others by arrays, all alike."""
        self.manager = manager
        self._pace = pace
        self.limits = limits
        self.counters = SchedulerCounters()
        self._queues = Queues(manager, self.counters, limits.max_num_seqs)
        self._rivals = Rivals(self._queues, limits)
        self._admission = Admission(self._queues, manager, limits, self.counters, self._rivals)
        self._outcomes = Outcomes(self._queues, manager, self.counters, few_rows)
        self._few_rows = few_rows
        self._counts = np.zeros(limits.max_num_seqs, np.int32)
        """[rows] the tokens that the step under way computes of running sequences."""
        self._has_prefills = False
        """Whether a running sequence may have more than one token to compute."""
        self._next_order = 0
        self._next_step = 0

    @property
    def waiting(self) -> list[Sequence]:
        return self._queues.waiting

    @property
    def running(self) -> list[Sequence]:
        return self._queues.running

    @property
    def has_unfinished(self) -> bool:
        return self._queues.has_unfinished

    @property
    def num_waiting(self) -> int:
        return self._queues.num_waiting

    # -- requests ----------------------------------------------------------------------------

    def add(
        self,
        request: Request,
        root: bytes,
        caching: bool,
        seeds: Iterable[int],
        new_guide: Callable[[Sequence], Guide] | None = None,
    ) -> None:
        """Queues a request's sequences, one per seed. Raises OverloadedError if the queue is full.

        `root` is the parent digest of its first block; `caching` whether it uses the prefix cache;
        `new_guide` makes what leads each sequence through a grammar.
        """
        limit = self.limits.max_num_queued_requests
        if self.num_waiting >= limit:
            raise OverloadedError(f"{self.num_waiting} requests wait already (limit {limit})")
        sequences, account = [], self._queues.fair_share.account(request.share)
        for index, seed in enumerate(seeds):
            kv = self._new_kv(request, root, caching)
            sequence = Sequence(
                request,
                index,
                kv,
                account,
                seed=seed,
                order=self._next_order,
                max_len=self.limits.max_model_len,
            )
            if new_guide is not None:
                sequence.guide, sequence.is_masked = new_guide(sequence), True
            self._next_order += 1
            sequences.append(sequence)
        self._queues.add(request.request_id, sequences)

    def _new_kv(self, request: Request, root: bytes, caching: bool) -> SequenceKV:
        # A hit has no hidden states, and so no logits of the prompt.
        needs_all = request.params.prompt_logprobs is not None or request.needs_all_states
        return SequenceKV(
            root=root,
            reads_cache=caching and not needs_all,
            writes_cache=caching,
            prompt_blocks=request.prompt_len // self.manager.block_size,
            salt=request.cache_salt,
        )

    def explain(self, request: Request, root: bytes, caching: bool) -> PrefixExplanation:
        """Returns what of a request's prompt would be found if it came now; lets it be found at
        once, if it is computed."""
        recent = self._queues.recent
        same_root = [one for one in self.running if one.kv.root == root]
        for one in same_root:
            self._queues.publish(one)
        running = [prompt_of(one) for one in same_root]
        return explain(
            self.manager,
            self._new_kv(request, root, caching),
            array("i", request.packed_prompt),
            [*recent.of_root(root), *(one for one in running if one.num_blocks)],
            recent.of_other_roots(request.tenant, root),
        )

    def forget_recent(self) -> None:
        """Forgets which prompts were computed, as the cache has forgotten what it had of them."""
        self._queues.recent.clear()

    def abort(self, request_id: str, index: int | None = None) -> list[TokenDelta]:
        """Ends a request, or one of its sequences, now: its blocks are free for the next step.

        Unknown and finished ones are ignored, since an abort may cross the last token.
        """
        unfinished = self._queues.unfinished_of(request_id)
        ended = [one for one in unfinished if index in (None, one.index)]
        self._queues.finish(ended)
        return [token_delta(one, (), FinishReason.ABORT) for one in ended]

    # -- schedule ----------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Returns the next step, or None if nothing can be computed before a commit."""
        began = time.perf_counter()
        builder = PlanBuilder(self._max_step_tokens(), self._queues.rows)
        if self._queues.suspects:
            if self._outcomes:
                return None  # whose fault it is, the step under way will tell
            self._schedule_suspects(builder)
        else:
            if self._has_rivals and self.num_waiting:
                num_decodes = self._num_decodes()
                self._admission.claim(builder, num_decodes)
            if not self._schedule_running(builder) and self.num_waiting:
                self._admit(self._admission.schedule, builder)
        if builder.is_empty:
            return None
        if self.manager.has_states:
            for sequence, start, end in builder.spans():
                self.manager.save(sequence.kv, start, end)
        step_id = self._next_step
        self._next_step += 1
        plan = builder.build(step_id, self._queues.take_freed_rows(), self.manager)
        self._outcomes.launch(plan, builder.sequences)
        self.counters.count_step(plan.num_tokens, plan.num_rows, time.perf_counter() - began)
        return plan

    def _max_step_tokens(self) -> int:
        """Returns how many tokens the next step may compute, its decodes always among them."""
        most = self.limits.max_num_batched_tokens
        has_prefills = self._has_prefills or self.num_waiting
        if self._pace is None or not has_prefills or self._queues.suspects:
            return most
        num_decodes = self._num_decodes()
        num_prompts = len(self.running) - num_decodes + self.num_waiting
        budget = self._pace.prefill_budget(num_decodes, num_prompts)
        return most if budget is None else min(most, num_decodes + budget)

    def _schedule_running(self, builder: PlanBuilder) -> bool:
        """Gives every running sequence its tokens; returns whether one was preempted for it."""
        rows, claimed = self._queues.running_rows, frozenset(builder.sequences)
        prefill_budget = builder.max_tokens - self._num_decodes(claimed) - builder.num_tokens
        grants = None
        if self._has_rivals and self._has_prefills:
            grants = self._rivals.grants(prefill_budget)
        self._has_prefills = bool(claimed)
        was_preempted = False
        passes = self.manager.passes if self.manager.has_bounds else None
        is_few = len(rows) <= self._few_rows
        others = self._unless_over() if is_few else self._count_decodes(rows, claimed)
        found: list[tuple[Sequence, int]] = []
        for sequence in others:
            if sequence.row is None or (claimed and sequence in claimed):
                continue  # One has been preempted for another, the others have their tokens.
            start, num_tokens = sequence.num_computed, sequence.num_tokens
            if passes and (start != sequence.prompt_len or sequence.request.params.n == 1):
                passes(sequence.kv, start)  # else samples are about to fork
            count = num_tokens - start
            if count != 1:
                self._has_prefills = True
                count = min(count, prefill_budget if grants is None else grants.get(sequence, 0))
                if count <= 0:
                    continue
                count = chunk_end(sequence, self.manager, start, start + count) - start
                prefill_budget -= count
            if start + count > sequence.kv.capacity:
                was_preempted |= self._make_room(sequence, start + count, claimed)
            found.append((sequence, count))
        found = [one for one in found if one[0].row is not None] if was_preempted else found
        if is_few:
            for sequence, count in found:
                builder.add(sequence, count)
        else:
            self._add_rows(builder, found)
        return was_preempted

    def _add_rows(self, builder: PlanBuilder, found: list[tuple[Sequence, int]]) -> None:
        """Computes the tokens of those in `_counts`, and so many of the sequences `found`."""
        counts, rows = self._counts, self._queues.running_rows
        for sequence, count in found:
            counts[sequence.row] = count
        rows = rows[counts[rows] > 0]
        if len(rows):
            builder.add_rows(rows, counts[rows])

    def _unless_over(self) -> list[Sequence]:
        """Returns the running sequences whose last token is not on its way, in order."""
        return [s for s in self.running if not s.num_pending or s.num_tokens < s.max_len]

    def _count_decodes(self, rows: Int32, claimed: Collection[Sequence]) -> list[Sequence]:
        """Notes in `_counts` the one token of each running sequence that only goes on, and none of
        the others, nor of those `claimed`; returns, in order, who may compute more than that."""
        there, kv = self._queues.rows, self.manager.rows
        num_tokens, pending = there.num_tokens(rows), there.pending[rows] > 0
        # Its last token is on its way.
        is_over = pending & (num_tokens >= there.max_lens[rows])
        goes_on = ~is_over & pending & (num_tokens - there.computed[rows] == 1)
        if claimed:
            goes_on &= ~np.isin(rows, [one.row for one in claimed if one.row is not None])
        if self.manager.has_bounds:
            # What is passed is given back, a block at a time.
            goes_on &= there.computed[rows] - kv.seen_from[rows] < self.manager.block_size
        is_full = goes_on & (num_tokens > kv.capacity[rows])
        goes_on &= ~is_full
        if is_full.any():
            full = [one.kv for one in there.sequences[rows[is_full]]]
            goes_on |= is_full & self.manager.grow(full)
        self._counts[rows] = goes_on
        return there.sequences[rows[~(goes_on | is_over)]].tolist()

    @property
    def _has_rivals(self) -> bool:
        return self._queues.fair_share.has_rivals

    def _num_decodes(self, but: Collection[Sequence] = ()) -> int:
        """Running sequences that compute one token; counted only while some compute more."""
        if not self._has_prefills:
            return len(self.running) - len(but)
        rows = self._queues.running_rows
        rows = rows[self._queues.rows.are_decoding(rows)]
        if not but:
            return len(rows)
        return sum(one not in but for one in self._queues.rows.sequences[rows])

    def _make_room(
        self,
        sequence: Sequence,
        num_tokens: int,
        claimed: Collection[Sequence],
    ) -> bool:
        """Allocates blocks for `num_tokens`. While there are too few, first all give back what they
        only keep for others, then the youngest are preempted, in the end `sequence` itself, which
        begins again alone if nobody else runs; returns whether anyone was preempted."""
        was_preempted = False
        while not self.manager.allocate(sequence.kv, sequence.num_computed, num_tokens):
            if any(self.manager.give_way(one.kv) for one in reversed(self.running)):
                continue
            was_preempted = True
            victim = self._victim(sequence, claimed)
            victim.runs_alone |= len(self.running) == 1
            self._queues.preempt(victim)
            if victim is sequence:
                break
        return was_preempted

    def _victim(self, sequence: Sequence, claimed: Collection[Sequence]) -> Sequence:
        """Returns who gives up its blocks to a running sequence, or that itself."""
        if self._has_rivals:
            victim = self._rivals.victim_of_growth(self._queues.place_of(sequence), claimed)
            if victim is not None:
                return victim
        # All that are claimed have their tokens in this step.
        return next((one for one in reversed(self.running) if one not in claimed), sequence)

    def _schedule_suspects(self, builder: PlanBuilder) -> None:
        """Computes suspects with nobody beside them. The others give up their blocks, so that there
        is room for suspects, and what they announced, so that no suspect waits for them."""
        group = self._queues.suspects.group
        for sequence in [s for s in self.running if s not in group]:
            self._queues.preempt(sequence)
        if not self._schedule_running(builder):
            self._admit(self._admission.schedule_suspects, builder)

    def _admit(self, admit: Callable[[PlanBuilder], None], builder: PlanBuilder) -> None:
        before = len(builder.sequences)
        admit(builder)
        self._has_prefills |= len(builder.sequences) > before

    # -- outcomes ----------------------------------------------------------------------------

    def prepare(self, plan: StepPlan) -> None:
        """Does what the commit of a launched step can have done while the device works."""
        self._outcomes.prepare(plan)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes over a step's tokens: appends, finishes, frees, publishes block digests."""
        return self._outcomes.commit(plan, result)

    def masked(self, plan: StepPlan) -> list[Sequence]:
        """Returns the sequences of a launched step's masked rows, in their order."""
        return self._outcomes.masked(plan)

    def is_lost(self, plan: StepPlan) -> bool:
        """Whether a launched step counts for nothing any more, since one before it raised."""
        return self._outcomes.is_lost(plan)

    def fail(self, plan: StepPlan, message: str) -> list[TokenDelta]:
        """A step raised: a sequence that was alone in it ends with an error; several are computed
        again apart."""
        return self._outcomes.fail(plan, message)

    def lose(self, plan: StepPlan, message: str) -> list[TokenDelta]:
        """A step found no memory: as `fail`, but a sequence alone ends only after MAX_LOSSES times
        without a new token."""
        return self._outcomes.lose(plan, message)

    # -- figures and checks ------------------------------------------------------------------

    @property
    def waste_share(self) -> float:
        """Slots of referenced blocks that hold no token, over all slots of referenced blocks."""
        unused = sum(s.kv.capacity - s.num_computed for s in self.running)
        return waste_share(self.manager, unused)

    def check(self) -> None:
        """Raises AssertionError if queues, rows and blocks contradict each other."""
        self._queues.check()
