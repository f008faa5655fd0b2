"""Models whose layers are not alike: states, page sizes, and what the machine would notice."""

from __future__ import annotations

import pytest

from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.token_pages import TokenPages
from octavo.step import Int32
from octavo.visibility import Chunk, Full, Window
from tests.scheduler.harness import FULL, Engine, spec_of, state_of


def test_a_turn_goes_on_from_the_state_behind_the_last_whole_block_of_the_one_before() -> None:
    engine = Engine(specs=(FULL, state_of(64, 512)), num_blocks=400, budget=60, max_model_len=60)
    prompt = list(range(23))
    engine.add("first", prompt, 4)
    engine.run()
    engine.add("again", prompt, 4)
    engine.add("next", [*prompt, *engine.tokens["first", 0], 7, 7], 4)
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.prefix_hit_tokens == 20 + 20


def test_a_chunk_that_the_budget_cuts_ends_with_a_block_so_that_its_state_is_kept() -> None:
    engine = Engine(specs=(FULL, state_of(64, 512)), num_blocks=400, budget=18, max_model_len=60)
    engine.add("first", list(range(40)), 1)
    engine.run()
    engine.add("other", [*range(20), 7, 7, 7], 1)
    engine.run()
    engine.check_tokens()
    assert engine.step_sizes[0] == 16
    assert engine.scheduler.counters.prefix_hit_tokens == 16


def test_states_are_kept_every_so_many_tokens_of_a_long_answer() -> None:
    engine = Engine(specs=(state_of(64, 8),), num_blocks=64, max_model_len=60, budget=60)
    engine.add("first", [1, 2, 3], 40)
    engine.run()
    engine.add("next", [1, 2, 3, *engine.tokens["first", 0], 7, 7], 4)
    engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.prefix_hit_tokens == 40  # of 43 - 1 that are computed


def test_samples_fork_from_the_state_before_the_last_token_of_their_prompt() -> None:
    engine = Engine(specs=(FULL, state_of(64, 512)), num_blocks=400, budget=60, max_model_len=60)
    engine.add("a", list(range(22)), 5, n=4, caching=False)
    engine.run()
    engine.check_tokens()
    assert engine.machine.num_computed == 22 + 3 + 4 * 4


def test_a_state_that_is_copied_outlives_its_eviction() -> None:
    engine = Engine(specs=(state_of(64, 512),), num_blocks=4, budget=60, max_model_len=60)
    for i in range(4):
        engine.add(f"r{i}", [*range(20), 40 + i], 3)
        engine.run()
    engine.check_tokens()
    assert engine.scheduler.counters.prefix_hit_tokens > 0


def test_what_one_page_size_gave_back_another_one_takes() -> None:
    engine = Engine(
        specs=(spec_of(Full(), 8), spec_of(Window(4), 20)),
        room_for=60,
        spare_chunks=0,
        budget=60,
        max_model_len=60,
    )
    # The window of the second class is short: most of its pages come back, and the first grows.
    engine.add("long", list(range(40)), 20)
    engine.run()
    engine.add("other", [7] * 40, 20)
    engine.run()
    engine.check_tokens()


def test_blocks_of_one_group_in_a_wrong_order_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = TokenPages.of_hit

    def reversed_pages(self: TokenPages, found: Int32, count: int) -> Int32:
        pages = find(self, found, count)
        return pages[::-1] if self.group.spec.visibility == Full() else pages

    monkeypatch.setattr(TokenPages, "of_hit", reversed_pages)
    engine = Engine(specs=(spec_of(Window(5)), FULL))
    engine.add("first", list(range(30)), 3)
    engine.run()
    engine.add("hit", list(range(30)), 3)
    with pytest.raises(AssertionError, match="groups disagree"):
        engine.run()


def test_a_prefix_behind_a_window_is_found_wherever_prompts_part() -> None:
    # Whole prompts in one step: the next one is planned before anybody can find their blocks.
    engine = Engine(specs=(spec_of(Window(5)), FULL, spec_of(Chunk(12))), budget=40, num_blocks=200)
    engine.add("first", list(range(40)), 6)
    engine.run()
    for length in (8, 13, 20, 30, 36):
        before = engine.scheduler.counters.prefix_hit_tokens
        engine.add(f"after{length}", [*range(length), 49, 48], 2)
        engine.run()
        found = engine.scheduler.counters.prefix_hit_tokens - before
        assert found == length // 4 * 4
    engine.check_tokens()


def test_what_is_kept_for_others_gives_way_before_anybody_is_preempted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def num_preemptions() -> int:
        engine = Engine(specs=(spec_of(Window(4)),), room_for=36, spare_chunks=2, budget=12)
        engine.add("decodes", [1, 2, 3], 30)
        engine.step()
        engine.add("prompt", list(range(30)), 2)
        engine.run()
        engine.check_tokens()
        return engine.scheduler.counters.num_preemptions

    assert num_preemptions() == 0
    monkeypatch.setattr(KVCacheManager, "give_way", lambda *_: False)
    assert num_preemptions() > 0


def test_a_window_holds_no_more_than_it_sees_once_its_prompt_is_committed() -> None:
    engine = Engine(specs=(spec_of(Window(5)),), budget=40, num_blocks=64)
    engine.add("one", list(range(40)), 12)
    for _ in range(4):
        engine.step()
    while engine.scheduler.has_unfinished:
        assert engine.manager.pools.num_referenced <= 4
        engine.step()
