"""What the engine tells about itself: one cumulative snapshot, and one record a finished request.

Filled by the engine and by AsyncLLM, rendered by `observe.metrics`; crosses processes as it is.
Never computes anything and never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MissReason = Literal["never_seen", "evicted", "other_tenant", "other_version", "too_short"]

STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of `EngineStats.step_token_counts`; one more bucket takes what is above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Gauges say how it is now; all other numbers count since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    """Requests that are queued or preempted."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    """Referenced by at least one sequence."""
    num_cached_blocks: int = 0
    """In the prefix index and referenced by nobody: free, but still worth a hit."""
    waste_share: float = 0.0
    """Slots of used blocks that hold no token, over all slots of used blocks (0..1)."""
    run_share: float = 1.0
    """Of the blocks of sequences of over 2,000 tokens, those that lie in runs of at least 128
    tokens in memory (0..1); 1 where no sequence is that long."""

    # From here to scheduler_seconds: as `scheduler.counters` names and counts them.
    prefix_query_tokens: int = 0
    """Prompt tokens that were looked up."""
    prefix_hit_tokens: int = 0
    prefix_miss_tokens: Mapping[MissReason, int] = field(default_factory=dict)
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Computed again after a preemption; never counted as a prefix hit."""
    num_splits: int = 0
    """Times that a step was cut in two because the device's memory was short."""
    num_lost_steps: int = 0
    """Steps that were too large even so: their sequences were preempted."""
    num_prompt_tokens: int = 0
    """Of prompts whose prefill is complete, cached tokens included."""
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0

    num_steps: int = 0
    num_step_tokens: int = 0
    """Sum over all steps of the tokens computed."""
    step_token_counts: Sequence[int] = ()
    """Steps by tokens computed: one count per bucket (not cumulative), then one for the rest."""
    scheduler_seconds: float = 0.0
    expert_counts: tuple[tuple[int, ...], ...] = ()
    """[MoE layers][experts] tokens routed; empty for dense models."""
    cache_config: Mapping[str, str] = field(default_factory=dict)
    """Labels of `cache_config_info`: block_size, num_gpu_blocks, cache_dtype, ..."""

    @property
    def usage_share(self) -> float:
        """Used blocks over all blocks (0..1)."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """One request after its last token. Times are seconds of the host's monotonic clock."""

    finish_reason: str
    num_prompt_tokens: int
    num_generation_tokens: int
    """Of all `n` sequences together."""
    n: int
    max_tokens: int | None
    arrival_time: float
    finished_time: float
    scheduled_time: float | None = None
    """When its first chunk entered a step; None if it never did."""
    first_token_time: float | None = None
