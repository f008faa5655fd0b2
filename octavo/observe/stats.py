"""What the engine tells about itself: one cumulative snapshot, and one record a finished request.

Filled by the engine and by AsyncLLM, rendered by `observe.metrics`; crosses processes as it is.
Never computes anything and never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

MissReason = Literal["never_seen", "evicted", "other_tenant", "other_version", "too_short"]

STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of `EngineStats.step_token_counts`; one more bucket takes what is above."""
STEP_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Of `EngineStats.step_row_counts`."""
STEP_SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
"""Of `EngineStats.step_seconds_counts`."""
SCHEDULER_SECONDS_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
"""Of `EngineStats.step_scheduler_counts`."""
MAX_TENANTS = 16
"""Told apart by name; the rest together, so that metrics do not grow with what operators add."""
OTHER_TENANTS = "others"
MAX_LISTED_REQUESTS = 64
"""Sequences told of one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """What one KV group holds of the arena now."""

    name: str
    """What its layers see: "all tokens", "a window of 512 tokens"."""
    num_layers: int
    formats: str
    used_bytes: int
    """Of pages that a running sequence refers to; one that several share counts once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What one tenant has in the engine now."""

    tenant: str
    """The beginning of its name in the engine, "" without keys, OTHER_TENANTS for all the rest."""
    num_running: int
    num_waiting: int
    kv_bytes: int
    """Of pages that its running sequences refer to; one that several of them share counts once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceNow:
    """How far one sequence is."""

    request_id: str
    index: int
    tenant: str
    is_running: bool
    prompt_len: int
    num_computed: int
    num_cached_tokens: int
    num_outputs: int
    max_outputs: int
    num_preemptions: int
    age_seconds: float
    """Since its request came."""


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
    num_step_rows: int = 0
    """Sum over all steps of the sequences in them."""
    step_row_counts: Sequence[int] = ()
    """Steps by sequences, as `step_token_counts`."""
    scheduler_seconds: float = 0.0
    step_scheduler_counts: Sequence[int] = ()
    """Steps by seconds that scheduling took."""
    step_seconds: float = 0.0
    """Sum over all steps of the time that each took on the device, or waited for it."""
    step_seconds_counts: Sequence[int] = ()
    """Steps by these seconds."""

    expert_imbalance: tuple[float, ...] = ()
    """[MoE layers] tokens of the busiest expert over the mean of all, lately, to four places; 1 is
    even, and what nothing is known of. Empty for dense models."""
    expert_counts: tuple[tuple[int, ...], ...] = ()
    """[MoE layers][experts] tokens routed; in detailed snapshots alone."""
    groups: tuple[GroupUsage, ...] = ()
    tenants: tuple[TenantUsage, ...] = ()
    """Those that have something here: most memory first, at most MAX_TENANTS and the rest."""
    sequences: tuple[SequenceNow, ...] = ()
    """Running ones, then waiting ones, each oldest first, at most MAX_LISTED_REQUESTS; in detailed
    snapshots alone."""
    num_dropped_events: int | None = None
    """Messages on the prefix cache that found the publisher's queue full; None: it has none."""
    cache_config: Mapping[str, str] = field(default_factory=dict)
    """Labels of `cache_config_info`: block_size, num_gpu_blocks, cache_dtype, ..."""
    engines: tuple[EngineStats | None, ...] = ()
    """Of a fleet, whose sum this is: each engine's, None for one that does not answer."""

    @property
    def usage_share(self) -> float:
        """Used blocks over all blocks (0..1)."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def hit_share(self) -> float:
        """Prompt tokens found over those looked up (0..1)."""
        queries = self.prefix_query_tokens
        return self.prefix_hit_tokens / queries if queries else 0.0


class FinishedRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request after its last token. Times are seconds of the host's monotonic clock."""

    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Prompt tokens from the prefix cache."""
    num_generation_tokens: int
    """Of all `n` sequences together."""
    max_generation_tokens: int = 0
    """Of the longest of them."""
    n: int
    max_tokens: int | None
    arrival_time: float
    finished_time: float
    scheduled_time: float | None = None
    """When its first chunk entered a step; None if it never did."""
    first_token_time: float | None = None
