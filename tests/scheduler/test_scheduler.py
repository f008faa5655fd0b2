"""The scheduler with its KV cache, driven against a machine that notices every wrong block."""

from __future__ import annotations

import pytest

from octavo.errors import OverloadedError
from octavo.request import FinishReason
from octavo.scheduler.outcomes import MAX_LOSSES
from octavo.step import NO_TOKEN, StepPlan
from tests.scheduler.harness import BLOCK, Engine
from tests.scheduler.paged_machine import (
    Fault,
    Ticket,
    expected_tokens,
)


def test_who_is_about_to_end_makes_room_and_nobody_is_preempted() -> None:
    # 20 blocks: two of the first kind fill 10 by their end; the long one needs 12 by then, and gets
    # in beside both because they end (after 8 tokens) before it has grown.
    engine = Engine(num_blocks=21, headroom=60, max_model_len=60, budget=60)
    for name in ("a", "b"):
        engine.add(name, [ord(name)] * 12, 8)
    engine.add("long", [3] * 16, 32)
    engine.step()
    assert len(engine.scheduler.running) == 3
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.num_preemptions == 0


def test_who_would_outgrow_the_cache_waits() -> None:
    engine = Engine(num_blocks=21, headroom=60, max_model_len=60, budget=60)
    engine.add("a", [1] * 12, 30)
    engine.add("b", [2] * 12, 30)
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.num_preemptions == 0


def test_a_request_alone_yields_its_tokens_in_chunks_within_the_budget() -> None:
    engine = Engine(budget=5)
    engine.add("a", list(range(23)), 6)
    engine.run()
    engine.check_tokens()
    assert max(engine.step_sizes) == 5


def test_decodes_and_prefill_chunks_share_a_step() -> None:
    engine = Engine(budget=8)
    engine.add("a", [1, 2, 3], 10)
    engine.step()
    engine.add("b", list(range(30)), 2)
    for _ in range(3):
        engine.step()
    assert engine.step_sizes[1:4] == [8, 8, 8]  # one decode and seven prompt tokens each
    engine.run()
    engine.check_tokens()


def test_requests_sent_at_once_compute_their_shared_prefix_once() -> None:
    engine = Engine(num_blocks=256, max_num_seqs=16, budget=64, max_model_len=160)
    prefix = [i % 47 for i in range(128)]
    for i in range(16):
        engine.add(f"r{i}", [*prefix, 48, i], 1)
    engine.run()
    engine.check_tokens()
    assert engine.machine.num_computed <= 128 + 16 * 2 * BLOCK


def test_parallel_samples_compute_the_prompt_once_and_copy_at_most_one_block() -> None:
    engine = Engine(num_blocks=128, budget=64)
    engine.add("a", list(range(30)), 5, n=4, caching=False)
    copies = 0
    while engine.scheduler.has_unfinished or engine.launched:
        plan = engine.scheduler.schedule()
        if plan is not None:
            copies += len(plan.copies)
            engine.launched.append((plan, engine.machine.launch(plan)))
        if engine.launched and (plan is None or len(engine.launched) > 1):
            launched, ticket = engine.launched.popleft()
            engine.hear(engine.collect(launched, ticket))
        engine.scheduler.check()
    engine.check_tokens()
    assert copies == 3
    # Every sample computes its outputs but the last, which nobody reads, and three the last
    # prompt token a second time.
    assert engine.machine.num_computed == 30 + 3 + 4 * 4


def test_a_repeated_prompt_hits_all_full_blocks_but_the_last_token() -> None:
    engine = Engine()
    prompt = list(range(24))
    engine.add("a", prompt, 1)
    engine.run()
    engine.add("b", prompt, 1)
    engine.run()
    engine.check_tokens()
    counters = engine.scheduler.counters
    assert counters.prefix_hit_tokens == 20
    assert counters.prefix_query_tokens == 48
    assert counters.prefix_miss_tokens == {"never_seen": 20, "too_short": 8}


def test_another_salt_never_hits_and_the_reason_says_so() -> None:
    engine = Engine()
    engine.add("a", list(range(24)), 1, salt="one")
    engine.run()
    engine.add("b", list(range(24)), 1, salt="two")
    engine.run()
    counters = engine.scheduler.counters
    assert counters.prefix_hit_tokens == 0
    assert counters.prefix_miss_tokens["other_tenant"] == 20


def test_an_evicted_prefix_is_missed_as_evicted() -> None:
    engine = Engine(num_blocks=14, max_model_len=40)
    engine.add("a", list(range(24)), 1)
    engine.run()
    engine.add("b", [49 - i for i in range(36)], 4)
    engine.run()
    engine.add("c", list(range(24)), 1)
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.prefix_miss_tokens["evicted"] > 0


def test_a_request_without_prefix_caching_neither_reads_nor_writes() -> None:
    engine = Engine()
    engine.add("a", list(range(24)), 1, caching=False)
    engine.run()
    assert engine.manager.pools.num_cached == 0
    engine.add("b", list(range(24)), 1)
    engine.run()
    engine.add("c", list(range(24)), 1, caching=False)
    engine.run()
    assert engine.scheduler.counters.prefix_hit_tokens == 0


def test_reset_forgets_every_prefix_or_none_while_blocks_are_in_use() -> None:
    engine = Engine()
    engine.add("a", list(range(24)), 1)
    engine.run()
    assert engine.manager.reset_prefix_cache()
    engine.add("b", list(range(24)), 8)
    engine.step()
    assert engine.scheduler.counters.prefix_hit_tokens == 0
    assert not engine.manager.reset_prefix_cache()
    engine.run()
    engine.add("c", list(range(24)), 1)
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.prefix_hit_tokens == 20


def test_a_lower_priority_number_runs_first() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("late", [1, 2, 3], 2, priority=5)
    engine.add("soon", [4, 5, 6], 2, priority=-1)
    engine.run()
    assert list(engine.reasons) == [("soon", 0), ("late", 0)]


def test_a_full_queue_refuses_with_its_limit() -> None:
    engine = Engine(max_num_queued_requests=1)
    engine.add("a", [1], 1)
    with pytest.raises(OverloadedError, match="limit 1"):
        engine.add("b", [1], 1)
    engine.run()
    engine.check_tokens()


def test_an_abort_frees_the_blocks_before_the_next_step() -> None:
    engine = Engine()
    engine.add("a", list(range(24)), 20, n=2)
    for _ in range(4):
        engine.step()
    assert engine.manager.pools.num_referenced > 0
    engine.hear(engine.scheduler.abort("a"))
    assert engine.manager.pools.num_referenced == 0
    assert set(engine.reasons.values()) == {FinishReason.ABORT}
    engine.run()


def test_an_abort_speaks_only_of_sequences_that_still_run() -> None:
    engine = Engine()
    engine.add("a", [1, 2, 3], 3, n=3)
    engine.step()
    engine.hear(engine.scheduler.abort("a", 1))
    engine.hear(engine.scheduler.abort("a"))
    assert len(engine.reasons) == 3
    engine.run()


def test_broken_logits_end_their_sequence_alone_and_publish_nothing() -> None:
    engine = Engine(budget=64)
    engine.add("broken", list(range(24)), 6)
    engine.add("sound", [40, 41, 42], 6)
    plan = engine.scheduler.schedule()
    assert plan is not None
    result = engine.machine.collect(engine.machine.launch(plan))
    result.token_ids[0] = NO_TOKEN
    engine.hear(engine.scheduler.commit(plan, result))
    engine.scheduler.check()
    assert engine.reasons == {("broken", 0): FinishReason.ERROR}
    assert engine.manager.pools.num_cached == 0
    engine.run()
    assert engine.reasons["sound", 0] is FinishReason.LENGTH
    assert engine.tokens["sound", 0] == expected_tokens([40, 41, 42], 0, 6, engine.groups)


def test_recomputing_after_preemption_is_counted_apart_from_hits() -> None:
    engine = Engine(num_blocks=12, max_model_len=40)
    for i in range(3):
        engine.add(f"r{i}", [i] * 9, 20)
    engine.run()
    engine.check_tokens()
    counters = engine.scheduler.counters
    assert counters.num_preemptions > 0
    assert counters.prefix_hit_tokens == 0


def test_sequences_of_steps_without_memory_are_computed_again() -> None:
    engine = Engine(failing={0, 1, 3, 7})
    for i in range(3):
        engine.add(f"r{i}", [i] * 9, 6)
    engine.run()
    engine.check_tokens()
    assert set(engine.reasons.values()) == {FinishReason.LENGTH}
    counters = engine.scheduler.counters
    assert counters.num_lost_steps == 3  # step 1 was lost with step 0
    assert counters.num_preemptions > 0


def test_samples_forked_from_a_prompt_that_found_no_memory_wait_for_it_again() -> None:
    engine = Engine(failing={0, 2})
    engine.add("a", list(range(10)), 6, n=3)
    engine.run()
    engine.check_tokens()
    assert set(engine.reasons.values()) == {FinishReason.LENGTH}


def test_samples_forked_from_a_prompt_whose_step_broke_compute_it_themselves() -> None:
    engine = Engine(faults=[Fault(tuple(range(10)), seed=0, position=3, is_early=False)])
    engine.add("a", list(range(10)), 6, n=3)
    engine.run()
    engine.check_tokens()
    reasons = [engine.reasons["a", index] for index in range(3)]
    assert reasons == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("position", [2, 6, 9])
def test_only_the_sequence_that_makes_its_step_raise_ends_with_an_error(
    position: int, is_early: bool
) -> None:
    guilty = Fault((5, 5, 5, 5, 5), seed=0, position=position, is_early=is_early)
    engine = Engine(num_blocks=128, max_num_seqs=16, budget=64, faults=[guilty])
    for i in range(11):
        engine.add(f"r{i}", [i] * 5, 12)
    engine.run()
    engine.check_tokens()
    reasons = {name: reason for (name, _), reason in engine.reasons.items()}
    assert reasons.pop("r5") is FinishReason.ERROR
    assert set(reasons.values()) == {FinishReason.LENGTH}
    assert len(engine.tokens["r5", 0]) == max(0, position - 4)
    # Halves of 11 sequences and their last steps: few more than without a fault.
    assert len(engine.step_sizes) < 12 + 3 * 5


def test_a_fault_of_company_ends_nobody() -> None:
    engine = Engine(num_blocks=128, budget=64)
    for i in range(8):
        engine.add(f"r{i}", [i] * 5, 12)
    launch = engine.machine.launch

    def raise_for_many(plan: StepPlan) -> Ticket:
        ticket = launch(plan)
        is_bad = plan.num_rows > 4 and plan.step_id % 5 == 0
        return ticket._replace(result=engine.machine.fail(plan)) if is_bad else ticket

    engine.machine.launch = raise_for_many  # type: ignore[method-assign]
    engine.run()
    engine.check_tokens()
    assert set(engine.reasons.values()) == {FinishReason.LENGTH}


def test_who_left_during_a_step_that_raised_leaves_the_blame_to_nobody() -> None:
    guilty = Fault((7, 7), seed=0, position=1, is_early=False)
    engine = Engine(faults=[guilty])
    engine.add("guilty", [7, 7], 4)
    engine.add("other", [8, 8], 4)
    engine.step()
    engine.hear(engine.scheduler.abort("guilty"))
    engine.run()
    engine.check_tokens()
    assert engine.reasons["other", 0] is FinishReason.LENGTH


def test_memory_that_never_comes_ends_a_sequence_with_the_error_and_the_next_one_lives() -> None:
    engine = Engine(failing=range(4, 100))
    engine.add("a", [1, 2, 3], 20)
    engine.run()
    assert engine.reasons == {("a", 0): FinishReason.ERROR}
    assert engine.scheduler.counters.num_preemptions == MAX_LOSSES + 1
    engine.check_tokens()
    assert engine.tokens["a", 0]
    engine.machine.failing = ()
    engine.add("b", [1, 2, 3], 4)
    engine.run()
    engine.check_tokens()
    assert engine.reasons["b", 0] is FinishReason.LENGTH


def test_losses_with_a_token_between_them_end_nothing() -> None:
    engine = Engine(failing=range(1, 1000, 4))
    engine.add("a", [1, 2, 3], 30)
    engine.run()
    engine.check_tokens()
    assert engine.reasons == {("a", 0): FinishReason.LENGTH}
    assert engine.scheduler.counters.num_lost_steps > MAX_LOSSES
