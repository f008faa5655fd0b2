"""A context of a million tokens: what its bookkeeping takes, without a model."""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.request import Request, SamplingParams, pack_ids
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.step import StepPlan, StepResult
from octavo.visibility import Full, Visibility, Window

LENGTH, STEP_TOKENS, NUM_OUTPUTS = 2**20, 8192, 40
ROOM = 10
"""Times that a step may take what it should: other tests run beside this one."""


@pytest.fixture(autouse=True)
def _own_garbage_alone() -> Iterator[None]:
    """What other tests left is not gone through while steps are timed: that takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def seconds_of(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


class Engine:
    """Steps of a scheduler whose device takes no time; remembers how long each took to plan."""

    def __init__(self, sees: tuple[Visibility, ...]) -> None:
        bfloat16 = kv_format("bfloat16")
        specs = tuple(attention_kv(8, 64, bfloat16, visibility=one) for one in sees)
        groups = group_layers(specs)
        manager = KVCacheManager(
            groups,
            num_chunks=len(groups) * LENGTH // 16 + 1024,
            block_size=16,
            max_rows=4,
            max_model_len=LENGTH + NUM_OUTPUTS,
        )
        limits = SchedulerLimits(
            max_num_seqs=4,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=LENGTH + NUM_OUTPUTS,
        )
        self.scheduler = Scheduler(manager, limits)
        self.seconds: list[float] = []
        self.num_tokens: list[int] = []

    def add(self, name: str, packed_prompt: bytes) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
        request = Request(request_id=name, packed_prompt=packed_prompt, params=params)
        self.scheduler.add(request, b"root", True, [0])

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.num_tokens.append(plan.num_tokens)
        self.scheduler.commit(plan, answer(plan))

    def run(self) -> None:
        while self.scheduler.has_unfinished:
            self.seconds.append(seconds_of(self.step))


def answer(plan: StepPlan) -> StepResult:
    tokens = np.full(int(plan.samples.sum()), 7, np.int32)
    return StepResult.single(plan, tokens)


@pytest.mark.parametrize(
    "sees", [(Full(),) * 12, (Full(), Window(128)) * 6], ids=["full", "full and windows"]
)
def test_a_million_tokens_are_admitted_and_planned_at_once_in_little_memory(
    sees: tuple[Visibility, ...],
) -> None:
    prompt = pack_ids(i * i % 50_021 for i in range(LENGTH))
    before = resident_bytes()
    engine = Engine(sees)
    engine.add("first", prompt)
    engine.run()
    bookkeeping = resident_bytes() - before
    engine.add("again", prompt)
    engine.run()
    assert engine.num_tokens[:128] == [STEP_TOKENS] * 128
    assert engine.num_tokens[128 + NUM_OUTPUTS - 1] == 16, "all but the last block is a hit"
    assert max(engine.seconds) < ROOM * 0.1
    assert bookkeeping < 64 * 2**20
