"""The ten-second line: rates between two snapshots, silence when nothing happens."""

from __future__ import annotations

from octavo.observe.stats import EngineStats
from octavo.observe.throughput import Throughput, in_words


def test_rates_are_those_since_the_last_line() -> None:
    throughput = Throughput(EngineStats(num_prompt_tokens=100, num_generation_tokens=50), 5.0)
    busy = EngineStats(
        num_running=3,
        num_waiting=1,
        num_blocks=8,
        num_used_blocks=2,
        num_prompt_tokens=300,
        num_generation_tokens=90,
        prefix_query_tokens=200,
        prefix_hit_tokens=50,
    )
    numbers = throughput.advance(busy, 15.0)
    assert numbers == {
        "running": 3,
        "waiting": 1,
        "prompt_tokens_per_second": 20.0,
        "generation_tokens_per_second": 4.0,
        "kv_cache_usage": 0.25,
        "prefix_hit_rate": 0.25,
    }
    assert in_words(numbers) == (
        "running 3, waiting 1; prompt 20.0 tokens/s, generation 4.0 tokens/s; "
        "KV cache 25.0% used; prefix hit rate 25.0%"
    )


def test_an_idle_engine_says_so_once() -> None:
    idle, throughput = EngineStats(), Throughput(EngineStats(), 0.0)
    assert throughput.advance(idle, 10.0) is None
    assert throughput.advance(EngineStats(num_running=1), 20.0) is not None
    last = throughput.advance(idle, 30.0)
    assert last is not None
    assert last["running"] == 0
    assert in_words(last).endswith("prefix hit rate -")
    assert throughput.advance(idle, 40.0) is None
