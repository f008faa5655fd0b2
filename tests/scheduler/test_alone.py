"""A sequence alone in the engine always ends if the limits said that it fits, wherever cached pages
lie in chunks."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.records import SequenceKV
from octavo.kv_cache.spec import KVSpec
from octavo.request import FinishReason
from octavo.visibility import Chunk, Full, Visibility, Window
from tests.scheduler.harness import Engine, spec_of, state_of

CASES = {
    "it grows until its window's pages pin the chunks that the other class needs": (
        (spec_of(Window(12), 8), spec_of(Full(), 20)),
        {"room": 48, "budget": 16},
        [([0] * 4, 44, 0), ([1] * 5, 2, 0)],
    ),
    "it starts from a hit whose pages lie in too many chunks": (
        (spec_of(Window(4), 12), spec_of(Full(), 20)),
        {"room": 32, "budget": 8},
        [([*range(16), *[40] * 4], 6, 0), ([*range(22), 41, 41], 8, 0)],
    ),
    "two grow to the limit, each with what the other left": (
        (spec_of(Full(), 12), spec_of(Window(8), 20)),
        {"room": 40, "budget": 40},
        [([0] * 3, 37, 0), ([1], 39, 1)],
    ),
    "two short ones leave their pages scattered before a long one": (
        (spec_of(Window(4), 12), spec_of(Full(), 20)),
        {"room": 32, "budget": 8},
        [([0], 5, 0), ([1] * 5, 5, 0), ([*range(22), *[2] * 5], 5, 0)],
    ),
}


def run_and_watch(engine: Engine, limit: int) -> int:
    """Runs to the end; returns in how many steps a sequence ran because it was given the room."""
    num_alone = 0
    for _ in range(limit):
        if not engine.scheduler.has_unfinished and not engine.launched:
            break
        engine.step()
        running = engine.scheduler.running
        if any(sequence.runs_alone for sequence in running):
            assert len(running) == 1, "somebody runs beside it"
            num_alone += 1
    engine.run(0)
    engine.check_tokens()
    return num_alone


@pytest.mark.parametrize("name", CASES)
def test_who_finds_no_room_alone_begins_again_once_and_ends(name: str) -> None:
    specs, sizes, requests = CASES[name]
    engine = Engine(
        specs=specs,
        room_for=sizes["room"],
        spare_chunks=0,
        max_num_seqs=3,
        budget=sizes["budget"],
        max_model_len=sizes["room"],
    )
    for i, (prompt, max_tokens, wait) in enumerate(requests):
        engine.add(f"r{i}", prompt, max_tokens)
        for _ in range(wait):
            engine.step()
    assert run_and_watch(engine, 400) > 0
    assert set(engine.reasons.values()) == {FinishReason.LENGTH}
    assert engine.scheduler.counters.num_preemptions <= len(requests) + 1


def test_who_runs_alone_goes_before_those_that_came_later() -> None:
    specs, sizes, requests = CASES["two grow to the limit, each with what the other left"]
    engine = Engine(
        specs=specs, room_for=sizes["room"], spare_chunks=0, budget=40, max_model_len=sizes["room"]
    )
    for i, (prompt, max_tokens, _) in enumerate(requests):
        engine.add(f"r{i}", prompt, max_tokens)
    for i in range(6):
        engine.add(f"late{i}", [5 + i], 2, n=2)
    assert run_and_watch(engine, 600) > 0
    assert len(engine.reasons) == 2 + 12


def visibility(rng: random.Random) -> Visibility:
    return rng.choice((Full(), Window(rng.randint(1, 20)), Chunk(rng.randint(1, 20))))


@pytest.mark.parametrize("seed", range(0, 24, 12))
def test_random_mixtures_in_tiny_caches_end(seed: int) -> None:
    for one in range(seed, seed + 12):
        rng = random.Random(one)
        specs = [spec_of(visibility(rng), rng.choice([8, 12, 20])) for _ in range(3)]
        specs += [state_of(rng.choice([16, 64, 100]), 4) for _ in range(rng.randint(0, 2))]
        engine = Engine(
            specs=specs,
            room_for=48,
            spare_chunks=rng.randint(0, 1),
            max_num_seqs=rng.randint(2, 6),
            budget=rng.randint(5, 40),
            max_model_len=60,
        )
        for i in range(rng.randint(2, 8)):
            shared = rng.choice([0, 17, 24, 33])
            prompt = [*range(shared), *(48 + (i + j) % 2 for j in range(rng.randint(1, 6)))]
            engine.add(f"r{i}", prompt, rng.randint(1, 9), n=rng.choice([1, 1, 3]))
            for _ in range(rng.randint(0, 6)):
                engine.step()
        run_and_watch(engine, 600)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(
        st.builds(
            spec_of,
            st.one_of(
                st.just(Full()), st.integers(1, 20).map(Window), st.integers(1, 20).map(Chunk)
            ),
            st.sampled_from([8, 12, 20]),
        ),
        min_size=2,
        max_size=4,
    ),
    states=st.lists(st.builds(state_of, st.sampled_from([16, 100]), st.just(4)), max_size=1),
    step_tokens=st.integers(1, 24),
    before=st.lists(st.integers(2, 40), max_size=4),
    steps=st.lists(st.integers(1, 24), min_size=48, max_size=48),
)
def test_what_is_claimed_can_always_be_had_and_moves_no_chunk(
    tokens: list[KVSpec],
    states: list[KVSpec],
    step_tokens: int,
    before: list[int],
    steps: list[int],
) -> None:
    engine = Engine(
        specs=[*tokens, *states],
        room_for=48,
        spare_chunks=0,
        budget=max(step_tokens, 5),
        max_model_len=60,
    )
    for i, length in enumerate(before):
        engine.add(f"r{i}", [*range(length)], 6)
        engine.step()
    engine.run(600)
    manager = engine.manager
    kv = SequenceKV(root=prefix_root(salt="other"))
    ids = array("i", [7] * 48)
    assert manager.claim(kv, 48, step_tokens)
    hit = manager.lookup(kv, ids)
    end = min(step_tokens, 48)
    assert manager.admit(kv, 0, hit, end)
    owners = [manager.pools.chunks.is_owned(index) for index in range(len(manager.pools.pools))]
    for step in steps:
        computed, end = end, min(end + min(step, step_tokens), 48)
        manager.publish(kv, ids, computed)
        assert manager.allocate(kv, computed, end)
        for index, owned in enumerate(owners):
            # What was nobody's may be taken; what a class has stays its own.
            assert not np.any(owned & ~manager.pools.chunks.is_owned(index))
    manager.check([0])
