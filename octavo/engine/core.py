"""The engine's loop: schedule -> launch -> collect -> commit, one step ahead of the device.

Called by LLM in its own process or by `engine.process` in a process of its own. Knows token ids
only: no text, no sockets.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as PySequence
from dataclasses import replace

import numpy as np

from octavo.config import EngineConfig
from octavo.constraint import Constraint
from octavo.engine.expert_load import ExpertLoad
from octavo.engine.figures import engine_stats
from octavo.engine.kv_events import EventEncoder, EventPublisher
from octavo.engine.prefixes import is_caching, request_root
from octavo.engine.step_times import StepTimes
from octavo.errors import CapacityError, EngineDeadError, OutOfMemoryError
from octavo.grammar import Guide, Guides
from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.journal import Changes, Journal, widest_group
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_events_config import read_kv_events
from octavo.observe.stats import EngineStats
from octavo.request import Request, TokenDelta
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.scheduler.pace import STRETCH, Pace
from octavo.scheduler.sequence import Sequence
from octavo.step import Runner, StepPlan, StepResult, Words

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 0.003
"""That a step waits for new grammars: nearly all are compiled within one."""
IDLE_COMPILE_SECONDS = 0.02
"""The same where there is nothing else to do."""


class EngineCore:
    """Requests in, token deltas out. One thread calls it."""

    def __init__(
        self,
        config: EngineConfig,
        plan: MemoryPlan,
        runner: Runner,
        identity: str,
        guides: Guides,
        is_in_fleet: bool = False,
    ) -> None:
        """`identity` names the weights and their version: the root of all prefix keys. `guides`
        say what bound outputs may go on with. `is_in_fleet`: what it holds is noted."""
        self.config = config
        self.plan = plan
        self._runner = runner
        self._identity = identity
        self._newest_root = "", request_root(identity, plan, "")
        """By salt: tenants' requests mostly come in a row."""
        self._guides = guides
        self._events = _event_publisher(config, plan)
        self.is_in_fleet = is_in_fleet
        self._journal = Journal(widest_group(plan.groups)) if is_in_fleet else None
        self._news = None
        if self._events is not None or is_in_fleet:
            told = (place for place, group in enumerate(plan.groups) if not group.is_state)
            self._news = CacheNews(told, plan.block_size)
        self._manager = KVCacheManager(
            plan.groups,
            num_chunks=plan.num_chunks,
            block_size=plan.block_size,
            max_rows=config.max_num_seqs,
            max_model_len=plan.max_model_len,
            poison=config.poison_freed_blocks,
            news=self._news,
        )
        layout = self._manager.layout
        need = self._manager.need(plan.max_model_len, plan.max_num_batched_tokens)
        if (needed := layout.num_chunks(need)) > plan.num_chunks:
            raise CapacityError(
                f"one sequence of {plan.max_model_len} tokens needs {needed} chunks of "
                f"{layout.chunk_bytes} bytes, {plan.num_chunks} are there; lower max_model_len",
                field="max_model_len",
            )
        stretch = STRETCH if config.step_stretch is None else config.step_stretch
        self._pace = Pace(stretch) if stretch else None
        self.scheduler = Scheduler(
            self._manager,
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=plan.max_num_batched_tokens,
                max_model_len=plan.max_model_len,
                max_num_queued_requests=config.max_num_queued_requests,
                num_kv_tokens=plan.num_tokens,
                headroom_tokens=_headroom(plan.num_tokens // config.max_num_seqs, plan.block_size),
            ),
            self._pace,
        )
        self._launched: deque[tuple[StepPlan, object]] = deque()
        self._newest_sampled = -1
        """The newest step whose masked rows are sampled."""
        self._aborted: list[TokenDelta] = []
        self._num_requests = 0
        self._experts = ExpertLoad()
        self._times = StepTimes()

    def add(self, request: Request) -> None:
        """Queues a request. Raises OverloadedError."""
        params = request.params
        root, caching = self._prefix_of(request)
        seed = params.seed
        if seed is None:
            seed = _mix(self.config.seed, self._num_requests)
        self._num_requests += 1
        seeds = [seed, *(_mix(seed, index) for index in range(1, params.n))]
        self.scheduler.add(request, root, caching, seeds, self._new_guide(request.constraint))

    def _prefix_of(self, request: Request) -> tuple[bytes, bool]:
        """Returns the root of a request's prefix, and whether it uses the prefix cache."""
        salt = request.cache_salt
        if salt != self._newest_root[0]:
            self._newest_root = salt, request_root(self._identity, self.plan, salt)
        return self._newest_root[1], is_caching(self.config, request)

    def explain_prefix(self, request: Request) -> PrefixExplanation:
        """Returns what of a request's prompt is cached now, and why not more. Runs nothing."""
        return self.scheduler.explain(request, *self._prefix_of(request))

    def take_changes(self) -> Changes | None:
        """Returns what prefixes came and went since the last call, in an engine of a fleet."""
        return None if self._journal is None else self._journal.take()

    @property
    def num_open(self) -> int:
        """Requests that run and wait."""
        return len(self.scheduler.running) + self.scheduler.num_waiting

    def warm_up(self) -> None:
        """Begins to load what the first grammar needs; returns at once."""
        self._guides.warm_up()

    def _new_guide(self, constraint: Constraint | None) -> Callable[[Sequence], Guide] | None:
        if constraint is None:
            return None
        return lambda sequence: self._guides.guide(constraint, sequence.stop_ids)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences; its blocks are free for the next step."""
        self._aborted += self.scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        return bool(self._launched or self._aborted) or self.scheduler.has_unfinished

    def step(self) -> list[TokenDelta]:
        """Launches the next step, then waits for the one before it; returns its tokens.

        Raises EngineDeadError if the device, or a rank, can be used no more.
        """
        self._guides.settle(COMPILE_SECONDS)
        plan = self.scheduler.schedule()
        if plan is not None:
            if self._pace is not None:
                self._pace.launched(plan)
            self._times.launched()
            self._launched.append((plan, self._runner.launch(plan)))
            self.scheduler.prepare(plan)
        deltas, self._aborted = self._aborted, []
        if self._launched and (plan is None or len(self._launched) > 1):
            deltas += self._collect(*self._launched.popleft())
        if self._launched:
            self._sample_masked(*self._launched[-1])
        else:
            self._guides.settle(IDLE_COMPILE_SECONDS)
        self._publish_news()
        return deltas

    def _publish_news(self) -> None:
        """Tells subscribers, and the routers of a fleet, what has changed in the prefix cache."""
        if self._news is None or not (news := self._news.take()):
            return
        if self._events is not None:
            self._events.publish(news)
        if self._journal is not None:
            self._journal.note(news)

    def _sample_masked(self, plan: StepPlan, ticket: object) -> None:
        """Has a step's masked rows sampled. All tokens before theirs are known now, since it is the
        only step under way: the device has all of its forward pass to wait for the masks."""
        if plan.masked is None or plan.step_id == self._newest_sampled:
            return
        self._newest_sampled = plan.step_id
        if self.scheduler.is_lost(plan):
            return
        assert len(self._launched) == 1
        sequences = self.scheduler.masked(plan)
        masks = self._guides.masks(
            [None if sequence.is_finished else sequence.guide for sequence in sequences],
            [sequence.num_outputs >= sequence.request.params.min_tokens for sequence in sequences],
        )
        for sequence, mask in zip(sequences, masks, strict=True):
            ban_words(mask, sequence.request.params.bad_words_token_ids, sequence.token_ids)
        self._runner.sample(ticket, masks)

    def _collect(self, plan: StepPlan, ticket: object) -> list[TokenDelta]:
        try:
            result = self._result_of(ticket)
        except EngineDeadError:
            logger.exception("step %d ended the engine", plan.step_id)
            self._launched.clear()
            raise
        except OutOfMemoryError as error:
            logger.warning("step %d found no memory: %s", plan.step_id, error)
            self._forget_time(plan)
            return self.scheduler.lose(plan, f"{type(error).__name__}: {error}")
        except Exception as error:  # the edge: a broken step must not end the engine
            if not self.scheduler.is_lost(plan):
                logger.exception("step %d of %d sequences failed", plan.step_id, plan.num_rows)
            self._forget_time(plan)
            return self.scheduler.fail(plan, f"{type(error).__name__}: {error}")
        if self._pace is not None:
            self._pace.collected(plan)
        if result.expert_counts is not None:
            self._experts.add(result.expert_counts)
        return self.scheduler.commit(plan, result)

    def _result_of(self, ticket: object) -> StepResult:
        try:
            return self._runner.collect(ticket)
        finally:
            self._times.collected()

    def _forget_time(self, plan: StepPlan) -> None:
        if self._pace is not None:
            self._pace.lost(plan)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; returns False if running requests still hold blocks."""
        has_forgotten = self._manager.reset_prefix_cache()
        if has_forgotten:
            self.scheduler.forget_recent()
            self._publish_news()
        return has_forgotten

    def stats(self, is_detailed: bool = False) -> EngineStats:
        """Returns a snapshot of all counters and gauges; `is_detailed`: also of each expert and
        each sequence."""
        is_caching = self.config.prefix_caching != "off"
        stats = engine_stats(
            self.scheduler, self.plan, self._times, self._experts, is_caching, is_detailed
        )
        if self._events is not None:
            stats = replace(stats, num_dropped_events=self._events.num_dropped)
        return stats

    def check(self) -> None:
        """Raises AssertionError if queues, tables, counts and keys contradict each other."""
        self.scheduler.check()

    def close(self) -> None:
        """Waits for launched steps and lets the runner go."""
        try:
            while self._launched:
                self._collect(*self._launched.popleft())
        finally:
            self._runner.close()
            self._guides.close()
            if self._events is not None:
                self._events.close()


def ban_words(mask: Words, words: Iterable[PySequence[int]], token_ids: PySequence[int]) -> None:
    """Clears the bits of what would complete a bad word of several tokens, unless nothing else is
    left."""
    for word in words:
        if len(word) < 2 or tuple(token_ids[1 - len(word) :]) != tuple(word[:-1]):
            continue
        index, bit = divmod(word[-1], 32)
        before = mask[index]
        mask[index] &= ~np.uint32(1 << bit)
        if not mask.any():
            mask[index] = before


def _event_publisher(config: EngineConfig, plan: MemoryPlan) -> EventPublisher | None:
    """Returns who publishes events of the KV cache, if anybody wants them. Raises ConfigError."""
    if config.kv_events_config is None:
        return None
    wanted = read_kv_events(config.kv_events_config)
    if not wanted.is_on:
        return None
    encoder = EventEncoder(plan.groups, plan.block_size, wanted.encoding, wanted.data_parallel_rank)
    return EventPublisher(wanted, encoder)


def _headroom(tokens_per_row: int, block_size: int) -> int:
    """A quarter of what each row would have if all were taken, and no more than helps; a cache too
    small for a block of it goes without."""
    headroom = min(128, tokens_per_row // 4)
    return headroom if headroom >= block_size else 0


def _mix(seed: int, index: int) -> int:
    """Returns a 63-bit seed that differs for every pair."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
