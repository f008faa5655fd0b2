"""Steps to the first token of one tenant, alone and beside a flood of another, and what planning a
step costs: JSON lines. No model: the scheduler and its KV cache alone.

    python -m benchmarks.fairness
"""

from __future__ import annotations

import json
import time
from itertools import count

import numpy as np

from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.request import Request, SamplingParams, Share, pack_ids
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.step import Purpose, StepPlan, StepResult
from octavo.visibility import Full

ROWS, BUDGET, BLOCK, FLOOD = 64, 2048, 16, 500


class Loop:
    """Schedules one step ahead of a machine whose every token is 1."""

    def __init__(self) -> None:
        spec = attention_kv(1, 8, kv_format("float32"), visibility=Full())
        manager = KVCacheManager(
            group_layers((spec,)),
            num_chunks=40_000,
            block_size=BLOCK,
            max_rows=ROWS,
            max_model_len=16_384,
        )
        limits = SchedulerLimits(
            max_num_seqs=ROWS, max_num_batched_tokens=BUDGET, max_model_len=16_384
        )
        self.scheduler = Scheduler(manager, limits)
        self.seconds: list[float] = []
        self.heard: set[str] = set()
        self._launched: StepPlan | None = None
        self._numbers = count(1)

    def add(self, name: str, length: int, max_tokens: int, tenant: str) -> None:
        """Adds a request whose prompt nobody has had before."""
        number = next(self._numbers)
        request = Request(
            request_id=name,
            packed_prompt=pack_ids([number, *([0] * (length - 1))]),
            params=SamplingParams(max_tokens=max_tokens),
            share=Share(tenant=tenant),
        )
        self.scheduler.add(request, prefix_root(salt=tenant), True, [0])

    def step(self) -> None:
        """Plans a step, and takes over the one before."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        self.seconds.append(time.perf_counter() - began)
        before, self._launched = self._launched, plan
        if before is not None:
            tokens = np.ones(np.count_nonzero(before.purposes == Purpose.TOKEN), np.int32)
            for delta in self.scheduler.commit(before, StepResult.single(before, tokens)):
                self.heard.add(delta.request_id)

    def steps_to(self, name: str) -> int:
        """Returns the steps until a request has its first token."""
        for steps in count(1):
            self.step()
            if name in self.heard:
                return steps
        raise AssertionError


def measured(length: int, flood_length: int, flood_tokens: int) -> dict[str, object]:
    """Returns what a flood adds to a prompt of `length` tokens."""
    alone, beside = Loop(), Loop()
    for number in range(FLOOD):
        beside.add(f"flood-{number}", flood_length, flood_tokens, "flood")
    for _ in range(50):
        beside.step()
    beside.seconds.clear()
    for loop in (alone, beside):
        loop.add("other", length, 4, "other")
    steps = [loop.steps_to("other") for loop in (alone, beside)]
    return {
        "prompt_tokens": length,
        "flood": {"requests": FLOOD, "prompt_tokens": flood_length, "max_tokens": flood_tokens},
        "steps_alone": steps[0],
        "steps_beside": steps[1],
        "schedule_us_beside": round(1e6 * float(np.median(beside.seconds))),
    }


def main() -> None:
    for length in (64, 8192):
        for flood_length, flood_tokens in ((64, 1000), (1000, 1), (8192, 8)):
            print(json.dumps(measured(length, flood_length, flood_tokens)), flush=True)


if __name__ == "__main__":
    main()
