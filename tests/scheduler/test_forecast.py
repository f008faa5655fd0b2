"""The forecast against counting pages step by step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from octavo.kv_cache.page_pools import Room
from octavo.kv_cache.records import Demand
from octavo.scheduler.forecast import Forecast, Growing

GROWING = st.builds(
    Growing, st.integers(1, 70), st.integers(0, 30), st.integers(0, 5), st.integers(0, 20)
)
DEMANDS = st.lists(
    st.one_of(
        st.builds(Demand, st.integers(0, 1), st.none(), st.integers(1, 2), st.just(False)),
        st.builds(Demand, st.integers(0, 1), st.integers(2, 9), st.integers(1, 2), st.just(False)),
        st.builds(Demand, st.integers(0, 1), st.just(1), st.just(1), st.just(True)),
    ),
    min_size=1,
    max_size=3,
)


def held_by(one: Growing, demand: Demand, columns: int) -> int:
    return columns if demand.most_pages is None else min(columns, demand.most_pages)


def counted(
    sequences: list[Growing], horizon: int, size: int, demands: list[Demand], shared: list[int]
) -> list[list[int]]:
    """Pages wanted of each class at each step."""
    found = []
    for step in range(horizon + 1):
        wanted, returned = [0, 0], [0, 0]
        for one in sequences:
            grown = one.num_tokens + min(step, one.num_left)
            more = one.num_missing - -grown // size - -(-one.num_tokens // size)
            for demand in demands:
                now = held_by(one, demand, one.num_held)
                then = held_by(one, demand, one.num_held + more)
                # the host hears of the end a step later
                if step > one.num_left + 1:
                    returned[demand.page_class] += now * demand.num_groups
                elif not demand.is_constant:
                    wanted[demand.page_class] += (then - now) * demand.num_groups
        pairs = zip(wanted, returned, shared, strict=True)
        found.append([max(0, want - max(0, back - keep)) for want, back, keep in pairs])
    return found


@given(
    running=st.lists(GROWING, max_size=8),
    candidate=GROWING,
    horizon=st.integers(0, 40),
    size=st.sampled_from([1, 4, 16]),
    demands=DEMANDS,
    shared=st.lists(st.integers(0, 30), min_size=2, max_size=2),
)
def test_what_is_wanted_is_what_counting_says(
    running: list[Growing],
    candidate: Growing,
    horizon: int,
    size: int,
    demands: list[Demand],
    shared: list[int],
) -> None:
    forecast = Forecast(horizon, size, 2, demands)
    forecast.add_all(np.array(running, np.int32).reshape(-1, 4).T)
    held = [0, 0]
    for one in running:
        for demand in demands:
            now = held_by(one, demand, one.num_held) * demand.num_groups
            held[demand.page_class] += now
    forecast.share(np.array(held, np.int64) - np.array(shared, np.int64))
    both = [*running, candidate]
    expected = np.array(counted(both, horizon, size, demands, shared)).T
    assert forecast.wanted_with(candidate).tolist() == expected.tolist()
    peak, none = expected.max(axis=1), np.zeros(2, np.int64)
    for more, fits in ((0, True), (1, True), (-1, False)):
        room = Room(peak + more, 0, np.ones(2, np.int64))
        assert forecast.fits(candidate, room, none) == (fits or bool((peak + more >= peak).all()))
        assert forecast.fits(candidate, Room(peak + more + 3, 0, none + 1), none + 3) == fits
    forecast.add(candidate)
    three = [*both, candidate]
    expected = np.array(counted(three, horizon, size, demands, shared)).T
    assert forecast.wanted_with(candidate).tolist() == expected.tolist()
