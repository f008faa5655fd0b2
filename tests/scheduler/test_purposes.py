"""Rows for a token, for several and for a vector, through scheduler and KV cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.request import FinishReason
from octavo.scheduler import outcomes
from octavo.step import Purpose, StepPlan, StepResult
from octavo.visibility import Window
from tests.scheduler.harness import BLOCK, FULL, Engine, spec_of
from tests.scheduler.paged_machine import expected_tokens


def test_a_vector_ends_its_sequence_beside_others_that_decode() -> None:
    engine = Engine(budget=16)
    engine.add("chat", [1, 2, 3], 12)
    engine.add("vector", list(range(10, 50)), wants_vector=True)
    engine.run()
    engine.check_tokens()
    assert engine.reasons["vector", 0] is FinishReason.STOP
    assert engine.tokens["vector", 0] == []
    assert len(engine.tokens["chat", 0]) == 12


def test_only_the_last_chunk_of_a_prompt_is_for_a_vector() -> None:
    engine = Engine(budget=8)
    engine.add("vector", list(range(20)), wants_vector=True)
    purposes = []
    while (plan := engine.scheduler.schedule()) is not None:
        purposes += plan.purposes.tolist()
        assert plan.row_starts == () or plan.row_starts[0].wants_vector
        engine.launched.append((plan, engine.machine.launch(plan)))
    assert purposes == [Purpose.NONE, Purpose.NONE, Purpose.VECTOR]
    assert not engine.reasons
    engine.run()
    engine.check_tokens()


def test_a_prompt_as_long_as_the_context_has_its_vector() -> None:
    engine = Engine(num_blocks=17, budget=16, max_model_len=64)
    engine.add("longest", list(range(64)), wants_vector=True)
    engine.add("other", list(range(64)), wants_vector=True, caching=False)
    engine.run()
    engine.check_tokens()
    assert len(engine.vectors) == 2


def test_vectors_take_and_leave_cached_prefixes_unless_they_need_all_states() -> None:
    engine = Engine(num_blocks=64, budget=64)
    prompt = list(range(4 * BLOCK + 2))
    for name, needs_all in (("first", False), ("hit", False), ("all", True)):
        engine.add(name, prompt, wants_vector=True, needs_all_states=needs_all)
        engine.run()
    engine.add("chat", prompt)
    engine.run()
    engine.check_tokens()
    cached = {name: count for (name, _), count in engine.num_cached.items()}
    assert cached == {"first": 0, "hit": 4 * BLOCK, "all": 0, "chat": 4 * BLOCK}
    assert engine.scheduler.counters.num_prompt_tokens == 4 * len(prompt)


def test_a_vector_that_is_no_number_ends_its_request_alone_and_is_not_published() -> None:
    engine = Engine(budget=64)
    engine.add("broken", list(range(24)), wants_vector=True)
    engine.add("sound", list(range(30, 54)), wants_vector=True)
    plan, result = one_step(engine)
    broken = {**result.vectors, 0: np.array([1.0, np.nan], np.float32)}
    deltas = engine.scheduler.commit(plan, replace(result, vectors=broken))
    engine.hear(deltas)
    assert engine.reasons["broken", 0] is FinishReason.ERROR
    assert [delta.stop_reason for delta in deltas] == [outcomes.BROKEN_STATES, None]
    assert engine.reasons["sound", 0] is FinishReason.STOP
    engine.add("again", list(range(24)), wants_vector=True)
    engine.run()
    assert engine.num_cached["again", 0] == 0


def one_step(engine: Engine) -> tuple[StepPlan, StepResult]:
    plan = engine.scheduler.schedule()
    assert plan is not None
    return plan, engine.machine.collect(engine.machine.launch(plan))


@pytest.mark.parametrize("given_tokens", [2, 3, 9])
def test_a_row_may_give_several_tokens(given_tokens: int) -> None:
    """As verified drafts will: those that were not computed yet are computed next."""
    engine = Engine(budget=32)
    prompts = {"one": [1, 2, 3, 4, 5], "several": [6, 7, 8]}
    for name, prompt in prompts.items():
        engine.add(name, prompt, 6)
    known = dict.fromkeys(prompts, 0)
    while engine.scheduler.has_unfinished:
        plan, result = one_step(engine)
        names = [s.request.request_id for s in engine.scheduler.running]
        tokens: list[int] = []
        starts = [0]
        for name in names:
            count = given_tokens if name == "several" else 1
            after = expected_tokens(prompts[name], 0, known[name] + count, engine.groups)
            tokens += after[known[name] :]
            known[name] += count
            starts.append(len(tokens))
        ragged = replace(
            result, token_ids=np.array(tokens, np.int32), token_starts=np.array(starts, np.int32)
        )
        engine.hear(engine.scheduler.commit(plan, ragged))
        engine.scheduler.check()
    engine.check_tokens()
    assert len(engine.tokens["several", 0]) == 6
    assert engine.scheduler.counters.num_generation_tokens == 12


def test_of_several_tokens_none_follows_the_one_that_ends_the_sequence() -> None:
    engine = Engine(budget=32)
    engine.add("stopped", [1, 2, 3], 9)
    sequence = engine.scheduler.waiting[0]
    sequence.stop_ids = frozenset({41})
    plan, result = one_step(engine)
    ragged = replace(
        result, token_ids=np.array([40, 41, 42], np.int32), token_starts=np.array([0, 3], np.int32)
    )
    engine.hear(engine.scheduler.commit(plan, ragged))
    assert engine.tokens["stopped", 0] == [40, 41]
    assert engine.reasons["stopped", 0] is FinishReason.STOP
    engine.run()


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.sampled_from(["vector", "all states", "tokens"]),
        st.integers(0, 2),  # of which three texts
        st.integers(0, 6),  # steps before the next
        st.booleans(),  # aborted before the next
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    REQUESTS, st.sampled_from([(FULL,), (FULL, spec_of(Window(6)))]), st.sets(st.integers(0, 20))
)
def test_whatever_comes_together_each_has_its_own_vector(requests, specs, failing) -> None:
    engine = Engine(num_blocks=20, budget=9, max_model_len=40, specs=specs, failing=failing)
    for place, (length, kind, text, steps, is_aborted) in enumerate(requests):
        engine.add(
            str(place),
            [(i * (text + 3)) % 50 for i in range(length)],
            3,
            wants_vector=kind != "tokens",
            needs_all_states=kind == "all states",
        )
        for _ in range(steps):
            engine.step()
        if is_aborted:
            engine.hear(engine.scheduler.abort(str(place)))
    engine.run()
    assert len(engine.reasons) == len(requests)
    engine.check_tokens()
