"""What one step and the queue may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one step and the queue may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_queued_requests: int = 4096
    num_kv_tokens: int = 0
    """Tokens that the KV cache holds; 0 if nobody's share of it is limited."""
    headroom_tokens: int = 0
    """A sequence is admitted only where it and all that run can go on for so many steps, those that
    reach their limit giving back their blocks: taking blocks away and computing them again costs
    more than waiting for the next to finish."""
