"""The scheduler and its KV cache in the loop of EngineCore, without a model."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container, Sequence

import numpy as np

from octavo.errors import OctavoError, OutOfMemoryError
from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.planner import chunks_of_sequence
from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.spec import KVSpec, Plane, attention_kv, group_layers, state_kv
from octavo.moments import Moment
from octavo.request import (
    NO_SHARE,
    FinishReason,
    Request,
    SamplingParams,
    Share,
    TokenDelta,
    pack_ids,
)
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.step import StepPlan
from octavo.visibility import Full, Visibility
from tests.scheduler.paged_machine import (
    Fault,
    PagedMachine,
    StepError,
    expected_tokens,
)

BLOCK = 4


def spec_of(sees: Visibility, head_size: int = 8) -> KVSpec:
    return attention_kv(1, head_size, kv_format("float32"), visibility=sees)


def state_of(size: int, every: int) -> KVSpec:
    state = Plane(name="state", shape=(size,), number="float32", bits=32, is_per_token=False)
    return state_kv(state, every=every)


FULL = spec_of(Full())


class Engine:
    """The loop of EngineCore around a PagedMachine, with checks after every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        spare_chunks: int | None = None,
        room_for: int = 0,
        specs: Sequence[KVSpec] = (FULL,),
        max_num_seqs: int = 8,
        budget: int = 16,
        max_model_len: int = 64,
        max_num_queued_requests: int = 4096,
        headroom: int = 0,
        num_kv_tokens: int = 0,
        failing: Container[int] = (),
        faults: Sequence[Fault] = (),
        news: CacheNews | None = None,
    ) -> None:
        """Steps in `failing` find no memory, those that compute a token of `faults` raise;
        `spare_chunks` are there beside those of one sequence of `room_for` tokens, if given."""
        self.groups = groups = group_layers(tuple(specs))
        if spare_chunks is not None:
            one = chunks_of_sequence(groups, room_for, BLOCK, budget)
            num_blocks = one + spare_chunks
        self.manager = KVCacheManager(
            groups,
            num_chunks=num_blocks,
            block_size=BLOCK,
            max_rows=max_num_seqs,
            max_model_len=max_model_len,
            poison=True,
            news=news,
        )
        self.scheduler = Scheduler(
            self.manager,
            SchedulerLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_model_len=max_model_len,
                max_num_queued_requests=max_num_queued_requests,
                headroom_tokens=headroom,
                num_kv_tokens=num_kv_tokens,
            ),
            # Where arrays begin, and where nobody is looked at alone, changes nothing.
            few_rows=num_blocks % 3,
        )
        self.machine = PagedMachine(groups, num_blocks, BLOCK, failing, faults)
        self.launched: deque[tuple[StepPlan, object]] = deque()
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.moments: dict[tuple[str, int], list[Moment]] = defaultdict(list)
        self.vectors: dict[str, list[float]] = {}
        self.num_cached: dict[tuple[str, int], int] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.requests: dict[str, Request] = {}
        self.step_sizes: list[int] = []

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        n: int = 1,
        priority: int = 0,
        salt: str = "",
        caching: bool = True,
        wants_vector: bool = False,
        needs_all_states: bool = False,
        is_traced: bool = False,
        share: Share = NO_SHARE,
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request = Request(
            request_id=name,
            packed_prompt=pack_ids(prompt),
            params=params,
            priority=priority,
            wants_vector=wants_vector,
            needs_all_states=needs_all_states,
            is_traced=is_traced,
            share=share,
        )
        self.scheduler.add(request, prefix_root(salt=salt), caching, range(n))
        self.requests[name] = request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if plan is not None:
            self.step_sizes.append(plan.num_tokens)
            self.launched.append((plan, self.machine.launch(plan)))
        if self.launched and (plan is None or len(self.launched) > 1):
            launched, ticket = self.launched.popleft()
            self.hear(self.collect(launched, ticket))
            self.scheduler.check()

    def collect(self, plan: StepPlan, ticket: object) -> list[TokenDelta]:
        try:
            result = self.machine.collect(ticket)
        except OutOfMemoryError as error:
            return self.scheduler.lose(plan, str(error))
        except (StepError, OctavoError) as error:
            return self.scheduler.fail(plan, str(error))
        return self.scheduler.commit(plan, result)

    def hear(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            self.moments[key] += delta.moments
            assert key not in self.reasons, "news of a finished sequence"
            self.tokens[key] += delta.token_ids
            if delta.vector is not None:
                self.vectors[delta.request_id] = np.frombuffer(delta.vector, np.float32).tolist()
                assert delta.finish_reason is FinishReason.STOP
            self.num_cached[key] = delta.num_cached_tokens
            if delta.finish_reason is not None:
                self.reasons[key] = delta.finish_reason

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished and not self.launched:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "a request starves"
        assert self.manager.pools.num_referenced == 0, "finished requests hold blocks"

    def check_tokens(self) -> None:
        """Every sequence that was not aborted has the tokens of a run alone."""
        for (name, index), reason in self.reasons.items():
            request = self.requests[name]
            if request.wants_vector:
                self._check_vector(request, reason)
                continue
            count = min(
                request.params.max_tokens or 0,
                self.scheduler.limits.max_model_len - request.prompt_len,
            )
            expected = expected_tokens(request.prompt_token_ids, index, count, self.groups)
            got = self.tokens[name, index]
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert got == expected[: len(got)]
            else:
                assert (got, reason) == (expected, FinishReason.LENGTH)

    def _check_vector(self, request: Request, reason: FinishReason) -> None:
        got = self.vectors.get(request.request_id)
        assert (got is None) == (reason in (FinishReason.ABORT, FinishReason.ERROR))
        if got is not None:
            [token] = expected_tokens(request.prompt_token_ids, 0, 1, self.groups)
            assert got == [token, request.prompt_len]
