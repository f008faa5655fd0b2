"""The pace of steps: on plain numbers, and with the real scheduler over a device that is only a
clock, in the closed loops that the figures name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.request import Request, SamplingParams, pack_ids
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.scheduler.pace import (
    FIRST_PREFILL_TOKENS,
    GROWTH,
    LATELY_STEPS,
    MAX_GROWN_SECONDS,
    MIN_PREFILL_TOKENS,
    MIN_TARGET_SECONDS,
    PROBE_STEPS,
    STRETCH,
    Pace,
)
from octavo.step import MAX_PADDED_TOKENS, StepPlan, StepResult, token_purposes


def olmoe_seconds(num_decodes: int, num_prefill_tokens: int) -> float:
    """OLMoE-1B-7B on an H100, as measured: 7 ms for 64 decodes, 11 for 256, 11 us a token."""
    decodes = np.interp(num_decodes, [0, 1, 64, 256, 1024], [3e-3, 3e-3, 7e-3, 11e-3, 27e-3])
    return float(decodes) + 11e-6 * num_prefill_tokens


@dataclass
class Loop:
    """Streams that each send their next prompt when their answer has ended; time is simulated."""

    num_streams: int
    prompt_len: int
    output_len: int
    waves: int = 4
    stretch: float = STRETCH
    seconds: Callable[[int, int], float] = olmoe_seconds
    now: float = 0.0
    device_free_at: float = 0.0
    sent_at: dict[str, float] = field(default_factory=dict)
    first_at: dict[str, float] = field(default_factory=dict)
    last_at: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        length = self.prompt_len + self.output_len
        num_blocks = self.num_streams * (-(-length // 16) + 1) + 2
        spec = attention_kv(1, 8, kv_format("float32"))
        manager = KVCacheManager(
            group_layers((spec,)),
            num_chunks=num_blocks,
            block_size=16,
            max_rows=self.num_streams,
            max_model_len=length,
        )
        limits = SchedulerLimits(
            max_num_seqs=self.num_streams, max_num_batched_tokens=8192, max_model_len=length
        )
        self.pace = Pace(self.stretch, clock=lambda: self.now) if self.stretch else None
        self.scheduler = Scheduler(manager, limits, self.pace)
        self.launched: deque[tuple[StepPlan, float]] = deque()
        self.rng = np.random.default_rng(0)
        self.rounds = [0] * self.num_streams

    def send(self, stream: int) -> None:
        name = f"{stream}:{self.rounds[stream]}"
        self.rounds[stream] += 1
        prompt = self.rng.integers(0, 1000, self.prompt_len).tolist()
        params = SamplingParams(max_tokens=self.output_len)
        request = Request(request_id=name, packed_prompt=pack_ids(prompt), params=params)
        self.sent_at[name] = self.now
        self.scheduler.add(request, prefix_root(), True, [0])

    def run(self) -> Loop:
        for stream in range(self.num_streams):
            self.send(stream)
        while self.scheduler.has_unfinished or self.launched:
            self.step()
        return self

    def step(self) -> None:
        """As EngineCore's: the next step is launched before the one before it is waited for."""
        plan = self.scheduler.schedule()
        if plan is not None:
            if self.pace is not None:
                self.pace.launched(plan)
            num_decodes = int((plan.query_lens == 1).sum())
            seconds = self.seconds(num_decodes, plan.num_tokens - num_decodes)
            self.device_free_at = max(self.device_free_at, self.now) + seconds
            self.launched.append((plan, self.device_free_at))
        if self.launched and (plan is None or len(self.launched) > 1):
            done, ends_at = self.launched.popleft()
            self.now = max(self.now, ends_at)
            if self.pace is not None:
                self.pace.collected(done)
            self.commit(done)

    def commit(self, plan: StepPlan) -> None:
        tokens = np.zeros(int(plan.samples.sum()), np.int32)
        result = StepResult.single(plan, tokens)
        for delta in self.scheduler.commit(plan, result):
            name = delta.request_id
            self.num_tokens += 1
            if name in self.last_at:
                self.gaps.append(self.now - self.last_at[name])
            else:
                self.first_at[name] = self.now
            self.last_at[name] = self.now
            if delta.finish_reason is not None:
                stream = int(name.partition(":")[0])
                if self.rounds[stream] < self.waves:
                    self.send(stream)

    @property
    def tokens_a_second(self) -> float:
        return self.num_tokens / self.now

    @property
    def gap_ratio(self) -> float:
        return float(np.percentile(self.gaps, 99) / np.median(self.gaps))

    @property
    def first_token_ratio(self) -> float:
        """Of the times to first tokens after the first wave."""
        times = [
            self.first_at[name] - sent
            for name, sent in self.sent_at.items()
            if not name.endswith(":0")
        ]
        return float(np.percentile(times, 99) / np.median(times))


@pytest.mark.parametrize(
    ("num_streams", "prompt_len", "output_len", "waves", "share"),
    [(64, 512, 128, 4, 0.95), (256, 512, 128, 3, 0.9), (1024, 32, 64, 3, 0.93)],
)
def test_streams_in_a_closed_loop_keep_their_pace_at_little_cost(
    num_streams: int, prompt_len: int, output_len: int, waves: int, share: float
):
    unpaced = Loop(num_streams, prompt_len, output_len, waves, stretch=0.0).run()
    paced = Loop(num_streams, prompt_len, output_len, waves).run()
    assert paced.num_tokens == unpaced.num_tokens == num_streams * output_len * waves
    assert paced.gap_ratio <= 2.5 < unpaced.gap_ratio
    assert paced.tokens_a_second >= share * unpaced.tokens_a_second
    if num_streams == 64:
        assert paced.first_token_ratio <= 2


def test_prompts_that_are_most_of_the_work_get_most_of_the_steps():
    unpaced, paced = Loop(24, 6000, 48, stretch=0.0).run(), Loop(24, 6000, 48).run()
    assert paced.tokens_a_second >= 0.8 * unpaced.tokens_a_second
    assert paced.gap_ratio <= 2.5


def test_captured_graphs_and_noise_do_not_upset_the_pace():
    rng = np.random.default_rng(3)

    def uneven(num_decodes: int, num_prefill_tokens: int) -> float:
        seconds = olmoe_seconds(num_decodes, num_prefill_tokens) * rng.normal(1.0, 0.03)
        return seconds + 0.5 * (rng.random() < 0.01)

    even = Loop(64, 512, 128, waves=3).run()
    loop = Loop(64, 512, 128, waves=3, seconds=uneven).run()
    assert np.percentile(loop.gaps, 95) <= 1.2 * np.percentile(even.gaps, 95)
    assert len(loop.sent_at) == 64 * 3


class Steps:
    """A pace, told of steps that take what `seconds` says."""

    def __init__(self, seconds: Callable[[int, int], float] = olmoe_seconds) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.pace = Pace(clock=lambda: self.now)
        self.num_steps = 0

    def run(self, num_decodes: int, num_prefill_tokens: int = 0, extra: float = 0.0) -> None:
        lens = np.array([1] * num_decodes + [num_prefill_tokens] * (num_prefill_tokens > 0))
        plan = StepPlan(
            step_id=self.num_steps,
            rows=np.arange(len(lens), dtype=np.int32),
            starts=np.zeros(len(lens), np.int32),
            query_lens=lens.astype(np.int32),
            token_ids=np.zeros(int(lens.sum()), np.int32),
            from_device=lens == 1,
            purposes=token_purposes(lens == 1),
        )
        self.num_steps += 1
        self.pace.launched(plan)
        self.now += self.seconds(num_decodes, num_prefill_tokens) + extra
        self.pace.collected(plan)


def test_a_lone_prompt_takes_all_it_wants_and_several_take_turns():
    steps = Steps()
    assert steps.pace.prefill_budget(0, 1) is None
    assert steps.pace.prefill_budget(0, 2) == FIRST_PREFILL_TOKENS
    assert steps.pace.prefill_budget(3, 1) == FIRST_PREFILL_TOKENS


def test_the_budget_is_what_the_target_leaves_beside_the_decodes():
    steps = Steps()
    for _ in range(9):
        steps.run(256)
        steps.run(256, 1000)
    budget = steps.pace.prefill_budget(256, 5)
    assert budget == pytest.approx((STRETCH - 1) * 11e-3 / 11e-6, rel=0.02)


def test_a_few_decodes_let_prompts_have_the_shortest_target():
    steps = Steps()
    for _ in range(9):
        steps.run(1)
        steps.run(1, 1000)
    wanted = (MIN_TARGET_SECONDS - olmoe_seconds(1, 0)) / 11e-6
    assert steps.pace.prefill_budget(1, 1) == pytest.approx(wanted, rel=0.02)


def test_steps_that_took_long_for_another_reason_count_for_nothing():
    steps = Steps()
    for i in range(30):
        steps.run(64, extra=0.8 * (i % 5 == 4))
        steps.run(64, 500, extra=0.8 * (i % 5 == 0))
    wanted = (STRETCH - 1) * 7e-3 / 11e-6
    assert steps.pace.prefill_budget(64, 5) == pytest.approx(wanted, rel=0.02)


def test_time_without_steps_counts_for_nothing():
    steps = Steps()
    for _ in range(9):
        steps.now += 60.0
        steps.run(64)
        steps.now += 60.0
        steps.run(64, 500)
    wanted = (STRETCH - 1) * 7e-3 / 11e-6
    assert steps.pace.prefill_budget(64, 5) == pytest.approx(wanted, rel=0.02)


def test_prompts_advance_even_where_a_token_costs_more_than_the_target():
    steps = Steps(lambda num_decodes, num_prefill_tokens: 0.05 + 0.02 * num_prefill_tokens)
    for _ in range(9):
        steps.run(4)
        steps.run(4, 64)
    assert steps.pace.prefill_budget(4, 1) == MIN_PREFILL_TOKENS


def test_where_prompts_never_cease_a_step_without_them_tells_what_decodes_cost():
    steps = Steps()
    for _ in range(9):
        steps.run(64)
        steps.run(64, 500)
    budgets = []
    for _ in range(2 * PROBE_STEPS + 2):
        budget = steps.pace.prefill_budget(64, 5)
        assert budget is not None
        budgets.append(budget)
        steps.run(64, budget)
    assert budgets.count(0) == 2
    assert min(budget for budget in budgets if budget) >= MIN_PREFILL_TOKENS


def test_steps_that_are_all_alike_grow_up_to_a_limit():
    def slow(num_decodes: int, num_prefill_tokens: int) -> float:
        return olmoe_seconds(num_decodes, 4 * num_prefill_tokens)

    steps = Steps(slow)
    for _ in range(20 * LATELY_STEPS):
        budget = steps.pace.prefill_budget(8, 50)
        assert budget is not None
        steps.run(8, budget)
    # Towards the limit, and not beyond it.
    seconds = slow(8, steps.pace.prefill_budget(8, 50) or 0)
    assert MAX_GROWN_SECONDS / GROWTH <= seconds <= 1.02 * MAX_GROWN_SECONDS


def test_a_step_that_raised_teaches_nothing():
    steps = Steps()
    for _ in range(9):
        steps.run(64)
        steps.run(64, 500)
    before = steps.pace.prefill_budget(64, 5)
    for step_id in range(100, 105):
        one = np.array([1], np.int32)
        plan = StepPlan(
            step_id=step_id,
            rows=one,
            starts=one,
            query_lens=one,
            token_ids=one,
            from_device=one == 1,
            purposes=token_purposes(one == 1),
        )
        steps.pace.launched(plan)
        steps.now += 9.0
        steps.pace.lost(plan)
    steps.run(64)
    assert steps.pace.prefill_budget(64, 5) == before


def test_a_step_with_prompts_stays_within_what_is_replayed_as_a_graph():
    # Beyond, a step takes as long as the host needs to launch it.
    cliff = lambda decodes, prompts: 7e-3 + 3e-6 * prompts + 0.01 * (decodes + prompts > 2048)
    steps = Steps(cliff)
    for _ in range(9):
        steps.run(64)
        steps.run(64, 500)
    assert steps.pace.prefill_budget(64, 5) == MAX_PADDED_TOKENS - 64


def test_what_was_seen_once_or_makes_more_prompts_cheaper_is_not_believed():
    steps = Steps()
    for _ in range(9):
        steps.run(64)
        steps.run(64, 300)
        steps.run(64, 600)
    steps.run(64, 500, extra=0.03)
    steps.run(64, 500, extra=0.03)
    wanted = (STRETCH - 1) * 7e-3 / 11e-6
    assert steps.pace.prefill_budget(64, 5) == pytest.approx(wanted, rel=0.02)
    steps.run(64, 500, extra=0.03)
    assert steps.pace.prefill_budget(64, 5) == pytest.approx(wanted, rel=0.02)


def test_costs_of_long_ago_are_forgotten():
    steps = Steps(lambda decodes, prompts: 2e-3 + 2e-6 * prompts)
    for _ in range(9):
        steps.run(128)
        steps.run(64)
        steps.run(64, 500)
        steps.run(64, 1000)
    steps.seconds = lambda decodes, prompts: 20e-3 + 40e-6 * prompts
    for _ in range(1100):
        steps.run(64)
        steps.run(64, 500)
    wanted = (STRETCH - 1) * 20e-3 / 40e-6
    assert steps.pace.prefill_budget(64, 5) == pytest.approx(wanted, rel=0.02)
