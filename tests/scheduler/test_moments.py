"""What a traced sequence is told to have gone through: its chunks, hits and preemptions."""

from __future__ import annotations

from tests.scheduler.harness import BLOCK, Engine


def test_moments_tell_every_chunk_and_the_hit_before_it() -> None:
    engine = Engine(budget=10)
    prompt = list(range(24))
    for name in ("cold", "warm"):
        engine.add(name, prompt, 3, is_traced=True)
        engine.run()
    engine.add("untraced", prompt, 3)
    engine.run()
    cold, warm = engine.moments["cold", 0], engine.moments["warm", 0]
    assert [one.kind for one in cold] == ["lookup", "prefill", "prefill", "prefill"]
    assert (cold[0].first, cold[0].count, cold[0].detail) == (24, 0, "never_seen")
    assert [(one.first, one.count) for one in cold[1:]] == [(0, 10), (10, 10), (20, 4)]
    assert all(one.start < one.end for one in cold[1:])
    assert (warm[0].count, warm[0].detail) == (20, "")
    assert [(one.first, one.count) for one in warm[1:]] == [(20, 4)]
    assert not engine.moments["untraced", 0]


def test_what_is_computed_again_after_a_preemption_is_told() -> None:
    engine = Engine(num_blocks=12, budget=32, max_num_seqs=4, max_model_len=36)
    for i in range(3):
        engine.add(f"r{i}", list(range(50 * i, 50 * i + 2 * BLOCK)), 16, is_traced=True)
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.num_preemptions
    told = [one for found in engine.moments.values() for one in found]
    preempted = [one for one in told if one.kind == "preempted"]
    assert len(preempted) == engine.scheduler.counters.num_preemptions
    for found in engine.moments.values():
        kinds = [one.kind for one in found]
        assert kinds.count("lookup") == 1 + kinds.count("preempted")
        assert all(one.end for one in found)
