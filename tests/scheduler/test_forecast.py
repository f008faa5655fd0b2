"""The forecast against counting blocks step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.scheduler.forecast import Forecast, Growing

GROWING = st.builds(
    Growing, st.integers(1, 70), st.integers(0, 30), st.integers(0, 5), st.integers(0, 20)
)


def counted(
    sequences: list[Growing], horizon: int, size: int, num_tables: int, num_shared: int
) -> int:
    peak = 0
    for step in range(horizon + 1):
        wanted = returned = 0
        for one in sequences:
            if step <= one.num_left + 1:  # the host hears of the end a step later
                wanted += one.num_missing
                grown = one.num_tokens + min(step, one.num_left)
                wanted += -(-grown // size) - -(-one.num_tokens // size)
            else:
                returned += one.num_held
        peak = max(peak, wanted * num_tables - max(0, returned * num_tables - num_shared))
    return peak


@given(
    running=st.lists(GROWING, max_size=8),
    candidate=GROWING,
    horizon=st.integers(0, 40),
    size=st.sampled_from([1, 4, 16]),
    num_tables=st.integers(1, 2),
    num_shared=st.integers(0, 30),
)
def test_the_peak_is_that_of_counting(
    running: list[Growing],
    candidate: Growing,
    horizon: int,
    size: int,
    num_tables: int,
    num_shared: int,
) -> None:
    forecast = Forecast(horizon, size, num_tables)
    forecast.add(running)
    held = sum(one.num_held for one in running)
    forecast.share(held * num_tables - num_shared, held)
    both = [*running, candidate]
    peak = counted(both, horizon, size, num_tables, num_shared)
    assert [forecast.fits(candidate, peak + more) for more in (-1, 0, 1)] == [False, True, True]
    assert forecast.peak_with(candidate) == peak
    forecast.add((candidate,))
    three = [*both, candidate]
    assert forecast.peak_with(candidate) == counted(three, horizon, size, num_tables, num_shared)
