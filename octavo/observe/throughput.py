"""The line that tells every few seconds how a loaded engine does.

Asked by the server with the newest EngineStats; a pure function of two snapshots and their times.
"""

from __future__ import annotations

from typing import Any

from octavo.observe.stats import EngineStats


class Throughput:
    """Compares snapshots with the one before."""

    def __init__(self, stats: EngineStats, now: float) -> None:
        """`now`: seconds of any steady clock, as in `advance`."""
        self._last = stats
        self._time = now
        self._was_busy = False

    def advance(self, stats: EngineStats, now: float) -> dict[str, Any] | None:
        """Returns the numbers since the last call, None if nothing happens and nothing did."""
        last, seconds = self._last, max(now - self._time, 1e-6)
        self._last, self._time = stats, now
        # An engine of a fleet that is started again counts from nothing.
        num_prompt = max(stats.num_prompt_tokens - last.num_prompt_tokens, 0)
        num_generated = max(stats.num_generation_tokens - last.num_generation_tokens, 0)
        is_busy = bool(num_prompt or num_generated or stats.num_running or stats.num_waiting)
        was_busy, self._was_busy = self._was_busy, is_busy
        if not is_busy and not was_busy:
            return None
        queries = max(stats.prefix_query_tokens - last.prefix_query_tokens, 0)
        hits = max(stats.prefix_hit_tokens - last.prefix_hit_tokens, 0)
        return {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "prompt_tokens_per_second": round(num_prompt / seconds, 1),
            "generation_tokens_per_second": round(num_generated / seconds, 1),
            "kv_cache_usage": round(stats.usage_share, 4),
            "prefix_hit_rate": round(hits / queries, 4) if queries else None,
        }


def in_words(numbers: dict[str, Any]) -> str:
    """Returns the numbers of `Throughput.advance` for people."""
    rate = numbers["prefix_hit_rate"]
    return (
        f"running {numbers['running']}, waiting {numbers['waiting']}; "
        f"prompt {numbers['prompt_tokens_per_second']:.1f} tokens/s, "
        f"generation {numbers['generation_tokens_per_second']:.1f} tokens/s; "
        f"KV cache {numbers['kv_cache_usage']:.1%} used; "
        f"prefix hit rate {'-' if rate is None else f'{rate:.1%}'}"
    )
