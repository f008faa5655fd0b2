"""What the scheduler counts since the engine started. Plain numbers; rendered elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from octavo.observe.stats import (
    SCHEDULER_SECONDS_BUCKETS,
    STEP_ROW_BUCKETS,
    STEP_TOKEN_BUCKETS,
    MissReason,
)


@dataclass(slots=True)
class SchedulerCounters:
    """Owned and written by the Scheduler."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_miss_tokens: dict[MissReason, int] = field(default_factory=dict)
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_splits: int = 0
    num_lost_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_steps: int = 0
    num_step_tokens: int = 0
    step_token_counts: list[int] = field(
        default_factory=lambda: [0] * (len(STEP_TOKEN_BUCKETS) + 1)
    )
    num_step_rows: int = 0
    step_row_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_ROW_BUCKETS) + 1))
    scheduler_seconds: float = 0.0
    step_scheduler_counts: list[int] = field(
        default_factory=lambda: [0] * (len(SCHEDULER_SECONDS_BUCKETS) + 1)
    )

    def count_step(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        self.num_steps += 1
        self.num_step_tokens += num_tokens
        self.step_token_counts[bisect_left(STEP_TOKEN_BUCKETS, num_tokens)] += 1
        self.num_step_rows += num_rows
        self.step_row_counts[bisect_left(STEP_ROW_BUCKETS, num_rows)] += 1
        self.scheduler_seconds += seconds
        self.step_scheduler_counts[bisect_left(SCHEDULER_SECONDS_BUCKETS, seconds)] += 1

    def count_lookup(
        self, num_tokens: int, num_hit: int, num_cacheable: int, reason: MissReason | None
    ) -> None:
        """A prompt of `num_tokens` was looked up, of which at most `num_cacheable` could hit.

        Missed tokens go to the reason of the first missing block; those after the last full
        block to `too_short`. Hits and misses add up to the queries.
        """
        self.prefix_query_tokens += num_tokens
        self.prefix_hit_tokens += num_hit
        misses = self.prefix_miss_tokens
        if reason is not None:
            misses[reason] = misses.get(reason, 0) + num_cacheable - num_hit
        misses["too_short"] = misses.get("too_short", 0) + num_tokens - num_cacheable
