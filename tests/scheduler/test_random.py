"""Random requests over random models: what is shared, lost or taken away changes no token."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.spec import KVSpec
from octavo.request import NO_SHARE, FinishReason, Share
from octavo.scheduler.outcomes import MAX_LOSSES
from octavo.visibility import Chunk, Full, Window
from tests.scheduler.harness import FULL, Engine, spec_of, state_of
from tests.scheduler.paged_machine import (
    Fault,
)

SHARES = {
    "": NO_SHARE,
    "a": Share(tenant="a", weight=0.5),
    "b": Share(tenant="b", weight=3.0, kv_share=0.3),
}
REQUEST = st.fixed_dictionaries(
    {
        "shared": st.integers(0, 30),
        "own": st.integers(1, 12),
        "max_tokens": st.integers(1, 14),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.sampled_from([0, 0, 0, 1]),
        "salt": st.sampled_from(["", "", "x"]),
        "tenant": st.sampled_from(sorted(SHARES)),
        "caching": st.sampled_from([True, True, True, False]),
        "wait": st.integers(0, 4),
        "abort_after": st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
        "fault": st.one_of(st.none(), st.none(), st.integers(0, 50)),
        "is_early": st.booleans(),
    }
)


VISIBILITY = st.one_of(
    st.just(Full()), st.integers(1, 20).map(Window), st.integers(1, 20).map(Chunk)
)
SPEC = st.one_of(
    st.builds(spec_of, VISIBILITY, st.just(8)),
    st.builds(spec_of, VISIBILITY, st.sampled_from([8, 12, 20])),
    st.builds(state_of, st.sampled_from([16, 64, 100]), st.sampled_from([4, 8, 16])),
)


@settings(max_examples=120, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=9),
    spare_chunks=st.integers(0, 12),
    specs=st.one_of(st.just([FULL]), st.lists(SPEC, min_size=1, max_size=4)),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(3, 24),
    headroom=st.sampled_from([0, 3, 16, 60]),
    reset_at=st.one_of(st.none(), st.integers(1, 20)),
    failing=st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 30), max_size=12)),
)
def test_random_arrivals_forks_cancels_preemptions_and_faults_change_no_token(
    requests: list[dict[str, int]],
    spare_chunks: int,
    specs: list[KVSpec],
    max_num_seqs: int,
    budget: int,
    headroom: int,
    reset_at: int | None,
    failing: frozenset[int],
) -> None:
    prompts = [
        [*range(r["shared"]), *((i * 7 + j) % 50 for j in range(r["own"]))]
        for i, r in enumerate(requests)
    ]
    faults = [
        Fault(tuple(prompt), i % r["n"], r["fault"], bool(r["is_early"]))
        for i, (r, prompt) in enumerate(zip(requests, prompts, strict=True))
        if r["fault"] is not None
    ]
    engine = Engine(
        spare_chunks=spare_chunks,
        room_for=max(
            len(prompt) + r["max_tokens"] for r, prompt in zip(requests, prompts, strict=True)
        ),
        specs=specs,
        max_num_seqs=max_num_seqs,
        budget=budget,
        max_model_len=60,
        headroom=headroom,
        failing=failing,
        faults=faults,
    )
    aborts: dict[int, list[str]] = defaultdict(list)
    step = 0
    for i, (r, prompt) in enumerate(zip(requests, prompts, strict=True)):
        engine.add(
            f"r{i}",
            prompt,
            r["max_tokens"],
            n=r["n"],
            priority=r["priority"],
            salt=str(r["salt"]),
            caching=bool(r["caching"]),
            share=SHARES[str(r["tenant"])],
        )
        if r["abort_after"] is not None:
            aborts[step + r["abort_after"]].append(f"r{i}")
        for _ in range(r["wait"]):
            engine.step()
            step += 1
            for name in aborts.pop(step, ()):
                engine.hear(engine.scheduler.abort(name))
                engine.scheduler.check()
            if step == reset_at:
                engine.manager.reset_prefix_cache()
    engine.run()
    engine.check_tokens()
    finished = {name for name, _ in engine.reasons}
    assert finished == set(engine.requests)
    assert len(engine.reasons) == sum(r["n"] for r in requests)
    for (name, index), reason in engine.reasons.items():
        request = engine.requests[name]
        fault = engine.machine.faults.get((tuple(request.prompt_token_ids), index))
        # The last token that is computed is the one before the last that is drawn.
        length = min(request.prompt_len + (request.params.max_tokens or 0), 60)
        is_guilty = fault is not None and fault.position < length - 1
        if is_guilty:
            # Somebody else may have computed this token of the prompt.
            is_cacheable = fault is not None and fault.position < request.prompt_len
            assert is_cacheable or reason is not FinishReason.LENGTH
        elif len(failing) <= MAX_LOSSES:
            assert reason is not FinishReason.ERROR


def random_engine(data: st.DataObject, specs: list[KVSpec]) -> Engine:
    """An engine in which little fits beside the longest request."""
    return Engine(
        specs=specs,
        room_for=48,
        spare_chunks=data.draw(st.integers(0, 6)),
        max_num_seqs=data.draw(st.integers(2, 6)),
        budget=data.draw(st.integers(5, 40)),
        max_model_len=60,
        headroom=data.draw(st.sampled_from([0, 16])),
    )


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(
        st.builds(spec_of, VISIBILITY, st.sampled_from([8, 12, 20])), min_size=1, max_size=3
    ),
    states=st.lists(
        st.builds(state_of, st.sampled_from([16, 64, 100]), st.sampled_from([4, 8])), max_size=2
    ),
    data=st.data(),
)
def test_groups_of_every_size_and_kind_share_memory_through_hits_forks_and_preemptions(
    tokens: list[KVSpec], states: list[KVSpec], data: st.DataObject
) -> None:
    engine = random_engine(data, [*tokens, *states])
    for i in range(data.draw(st.integers(2, 10))):
        shared = data.draw(st.sampled_from([0, 17, 24, 33]))
        own = data.draw(st.integers(1, 6))
        engine.add(
            f"r{i}",
            [*range(shared), *(48 + (i + j) % 2 for j in range(own))],
            data.draw(st.integers(1, 9)),
            n=data.draw(st.sampled_from([1, 1, 3])),
        )
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
    engine.run()
    engine.check_tokens()
