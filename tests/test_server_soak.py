"""The soak of a whole server, for seconds: tenants, budgets, guard, audit, traces, clients that
leave."""

from __future__ import annotations

import pytest

from benchmarks.server_soak import Load, soak


@pytest.mark.slow
def test_a_short_soak_of_a_server_loses_nothing() -> None:
    account = soak(seconds=12, num_clients=6, fronts=2, seed=3)
    assert account["problems"] == {}
    assert account["ok"]
    assert {"200", "400", "429", "503", "left"} <= account["outcomes"].keys()
    assert sum(account["audited"].values()) == account["requests"]


def test_what_is_not_whole_or_went_past_the_guard_is_noticed() -> None:
    load = Load("", 1)
    load._check(200, True, "once", "data: {}\n\ndata: [DONE]\n\n")
    load._check(200, False, "once", "{}")
    load._check(400, False, "forbidden", "{}")
    assert not load.problems
    load._check(200, True, "once", "data: {}\n\n")
    load._check(200, False, "forbidden", "{}")
    assert load.problems == {"a stream that does not end": 1, "a refused prompt was served": 1}
