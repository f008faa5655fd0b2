"""Who is chosen: properties of the policy, of what a router knows, and the whole at work."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.prefix_traces import BLOCK, PROMPT_TOKENS, chains_of, question, questions
from octavo.fleet.holdings import Holdings
from octavo.fleet.policy import MISSING_WEIGHT, Candidate, Recent, choose
from octavo.fleet.router import Ask, Router

AMOUNTS = st.floats(0, 1e6)
CANDIDATES = st.lists(
    st.tuples(st.integers(0, 4096), AMOUNTS, AMOUNTS, AMOUNTS), min_size=1, max_size=6
).map(
    lambda rows: [
        Candidate(name=str(i), num_cached=c, work=w, recent=r, tenant_work=min(t, w))
        for i, (c, w, r, t) in enumerate(rows)
    ]
)


@given(CANDIDATES, st.integers(1, 4096), st.text(max_size=5))
@settings(max_examples=100)
def test_no_other_engine_is_better_in_everything(
    candidates: list[Candidate], num_tokens: int, key: str
) -> None:
    best = candidates[choose(candidates, num_tokens, key)]
    for one in candidates:
        assert not (
            min(one.num_cached, num_tokens) > min(best.num_cached, num_tokens)
            and one.work < best.work
            and one.recent < best.recent
            and one.tenant_work < best.tenant_work
        )


@given(CANDIDATES, st.integers(1, 4096), st.text(max_size=5), st.randoms())
@settings(max_examples=50)
def test_the_order_in_which_engines_are_named_does_not_matter(
    candidates: list[Candidate], num_tokens: int, key: str, rng: random.Random
) -> None:
    best = candidates[choose(candidates, num_tokens, key)]
    rng.shuffle(candidates)
    assert candidates[choose(candidates, num_tokens, key)] == best


def test_equal_engines_share_keys_and_keep_theirs_when_one_leaves() -> None:
    engines = [Candidate(name=str(i)) for i in range(4)]
    chosen = [engines[choose(engines, 100, str(key))].name for key in range(400)]
    assert all(70 < chosen.count(one.name) < 130 for one in engines)
    fewer = engines[:3]
    again = [fewer[choose(fewer, 100, str(key))].name for key in range(400)]
    assert all(old in (new, "3") for old, new in zip(chosen, again, strict=True))


def test_a_prefix_is_left_when_waiting_costs_more_than_computing() -> None:
    def chosen(work: float) -> int:
        holder = Candidate(name="a", num_cached=1000, work=work)
        return choose([holder, Candidate(name="b")], 1100, "")

    assert chosen(MISSING_WEIGHT * 1000 - 1) == 0
    assert chosen(MISSING_WEIGHT * 1000 + 1) == 1


def test_a_tenant_spreads_its_own_work_first() -> None:
    mine = Candidate(name="a", work=1000, tenant_work=1000)
    others = Candidate(name="b", work=1500)
    assert choose([mine, others], 100, "") == 1


def test_nobody_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no engine"):
        choose([], 1, "")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(1, 5000)), max_size=60))
@settings(max_examples=50)
def test_recent_work_is_bounded_and_never_negative(given: list[tuple[str, float]]) -> None:
    recent = Recent(1000)
    for name, work in given:
        recent.add(name, work, 3)
    total = sum(recent.of(name) for name in "abc")
    assert 0 <= total <= 3 * 1000 + 5000


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove"]), st.lists(st.integers(0, 30), max_size=8)),
        max_size=20,
    ),
    st.integers(1, 12),
)
@settings(max_examples=100)
def test_holdings_are_the_blocks_used_last(
    steps: list[tuple[str, list[int]]], capacity: int
) -> None:
    holdings, expected = Holdings(capacity), OrderedDict[int, None]()
    for kind, hashes in steps:
        if kind == "add":
            holdings.add(hashes)
            for one in hashes:
                expected[one] = None
                expected.move_to_end(one)
            while len(expected) > capacity:
                expected.popitem(last=False)
        else:
            holdings.remove(hashes)
            for one in hashes:
                expected.pop(one, None)
        assert len(holdings) == len(expected)
        assert all(holdings.num_leading([one]) == (one in expected) for one in range(31))


def ask(request_id: str, hashes: list[int], tenant: str = "", num_outputs: int = 10) -> Ask:
    return Ask(
        request_id=request_id,
        num_tokens=16 * len(hashes) + 5,
        num_outputs=num_outputs,
        hashes=hashes,
        tenant=tenant,
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["route", "begun", "end", "leave", "join", "counted"]),
            st.integers(0, 9),
            st.integers(0, 3),
        ),
        max_size=60,
    )
)
@settings(max_examples=100)
def test_a_router_counts_what_is_open_and_nothing_else(steps: list[tuple[str, int, int]]) -> None:
    router = Router(16)
    router.join("0")
    where: dict[str, str] = {}
    for kind, number, engine in steps:
        request_id, name = str(number), str(engine)
        if kind == "route":
            choice = router.route(ask(request_id, list(range(number))))
            where.pop(request_id, None)
            assert (choice is None) == (not router.names)
            if choice is not None:
                where[request_id] = choice.name
        elif kind == "begun":
            router.begun(request_id)
        elif kind == "end":
            router.end(request_id)
            where.pop(request_id, None)
        elif kind == "leave":
            router.leave(name)
            where = {one: at for one, at in where.items() if at != name}
        elif kind == "join" and name not in router.names:
            router.join(name)
        elif kind == "counted":
            router.counted(name, number)
        for one in router.names:
            count = sum(at == one for at in where.values())
            assert router.num_open(one) == count
            assert router.work_of(one) >= 0
            assert count or router.work_of(one) == 0


def test_what_shares_a_prefix_goes_where_it_is_and_elsewhere_if_that_left() -> None:
    router = Router(16)
    for name in "ab":
        router.join(name)
    first = router.route(ask("1", [1, 2, 3]))
    assert first is not None
    for number in range(2, 6):
        choice = router.route(ask(str(number), [1, 2, 3, 10 + number]))
        assert choice is not None
        assert (choice.name, choice.num_cached) == (first.name, 48)
        router.end(str(number))
    (other,) = {"a", "b"} - {first.name}
    without = router.route(ask("6", [1, 2, 3]), [first.name])
    assert without is not None
    assert (without.name, without.num_cached) == (other, 0)
    router.leave(first.name)
    router.leave(other)
    assert router.route(ask("7", [1])) is None


def test_what_an_engine_has_evicted_it_is_not_asked_for() -> None:
    router = Router(16)
    for name in "ab":
        router.join(name)
    first = router.route(ask("1", [1, 2, 3]))
    assert first is not None
    router.end("1")
    router.removed(first.name, [3])
    choice = router.route(ask("2", [1, 2, 3]))
    assert choice is not None
    assert choice.num_cached == 32
    router.cleared(first.name)
    (other,) = {"a", "b"} - {first.name}
    router.end("2")
    router.stored(other, [1, 2, 3])
    choice = router.route(ask("3", [1, 2, 3, 4]))
    assert choice is not None
    assert choice.name == other


def test_without_digests_load_alone_decides() -> None:
    router = Router(16)
    for name in "abcd":
        router.join(name)
    for number in range(40):
        router.route(Ask(request_id=str(number), num_tokens=100, num_outputs=10))
    assert [router.num_open(name) for name in "abcd"] == [10] * 4


def test_what_other_routers_sent_counts_too() -> None:
    router = Router(16)
    for name in "ab":
        router.join(name)
    router.counted("a", 50)
    for number in range(10):
        choice = router.route(Ask(request_id=str(number), num_tokens=100, num_outputs=10))
        assert choice is not None
        assert choice.name == "b"


def leading(chain: tuple[int, ...], cached: OrderedDict[int, None]) -> int:
    return next((i for i, one in enumerate(chain) if one not in cached), len(chain))


def ask_lru(chain: tuple[int, ...], cached: OrderedDict[int, None], size: int) -> list[int]:
    """Serves a chain from a cache; returns what was evicted."""
    for block in reversed(chain):
        cached[block] = None
        cached.move_to_end(block)
    return [cached.popitem(last=False)[0] for _ in range(len(cached) - size)]


def test_four_engines_hit_nearly_as_often_as_one_of_four_times_the_size() -> None:
    trace = [question(one, i) for i, one in enumerate(questions(random.Random(0), 1200, 0))]
    chains = [chain.blocks[: PROMPT_TOKENS // BLOCK] for chain in chains_of(trace)]
    size = len({block for chain in chains for block in chain}) // 12
    whole: OrderedDict[int, None] = OrderedDict()
    whole_hits = 0
    for chain in chains:
        whole_hits += leading(chain, whole)
        ask_lru(chain, whole, 4 * size)
    router, names = Router(16), "abcd"
    caches = {name: OrderedDict[int, None]() for name in names}
    computed = dict.fromkeys(names, 0)
    hits = 0
    for name in names:
        router.join(name, size)
    for place, chain in enumerate(chains):
        router.end(str(place - 8))  # eight are under way
        choice = router.route(ask(str(place), list(chain)))
        assert choice is not None
        found = leading(chain, caches[choice.name])
        hits += found
        computed[choice.name] += len(chain) - found
        evicted = ask_lru(chain, caches[choice.name], size)
        router.removed(choice.name, evicted)
    assert hits >= 0.9 * whole_hits
    even = sum(computed.values()) / 4
    assert all(abs(one - even) <= 0.15 * even for one in computed.values())
