"""Budgets of tenants: what is let in, what is told, what comes back, one count for all fronts."""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.server.errors import ApiError
from octavo.server.tenants import counts as counts_module
from octavo.server.tenants.budgets import UNSTATED_TOKENS, Budgets
from octavo.server.tenants.callers import Limits, Tenant
from octavo.server.tenants.counts import PROBES, SharedCounts
from octavo.server.tenants.key_file import hash_of
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine


def tenant(name: str = "a", **limits: int) -> Tenant:
    return Tenant(id=f"tenant:{name}", name=name, secret=b"x", limits=Limits(**limits))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budgets(clock: Clock | None = None, counts: SharedCounts | None = None) -> Budgets:
    return Budgets(counts or SharedCounts(), clock or Clock())


def test_a_minute_has_its_requests_and_they_come_back_evenly() -> None:
    clock, one = Clock(), tenant(requests_per_minute=60)
    own = budgets(clock)
    for _ in range(60):
        own.take(one, 10)
    with pytest.raises(ApiError) as refused:
        own.take(one, 10)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.kind == "requests"
    assert refused.value.headers == {
        "Retry-After": "1",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    own.take(tenant("b", requests_per_minute=60), 10)
    clock.now += 1.0
    own.take(one, 10)
    with pytest.raises(ApiError):
        own.take(one, 10)


def test_tokens_that_were_not_used_come_back() -> None:
    one, own = tenant(tokens_per_minute=1000), budgets()
    lease = own.take(one, 900)
    with pytest.raises(ApiError) as refused:
        own.take(one, 900)
    assert refused.value.kind == "tokens"
    lease.settle(900, 100)
    assert own.take(one, 900).facts[0].remaining == 0


def test_what_is_more_than_a_whole_budget_is_not_asked_to_wait() -> None:
    one, own = tenant(requests_per_minute=1, tokens_per_minute=1000), budgets()
    own.take(one, 1)  # none is left of its requests either, for which it would wait in vain
    for amount in (1001, 2000):
        with pytest.raises(ApiError, match="smaller max_tokens") as refused:
            own.take(one, amount)
        assert (refused.value.status, refused.value.code) == (400, "request_exceeds_budget")
        assert refused.value.kind is None
        assert "Retry-After" not in (refused.value.headers or {})


def test_a_day_has_its_tokens_beside_the_minutes() -> None:
    clock, one = Clock(), tenant(tokens_per_minute=100, tokens_per_day=250)
    own = budgets(clock)
    for _ in range(2):
        own.take(one, 100)
        clock.now += 60
    with pytest.raises(ApiError, match="a day") as refused:
        own.take(one, 100)
    assert refused.value.headers is not None
    assert 10_000 < int(refused.value.headers["Retry-After"]) < 86400


def test_so_many_are_open_at_once_and_a_batch_is_none_of_them() -> None:
    one, own = tenant(max_concurrent=2), budgets()
    leases = [own.take(one, 1) for _ in range(2)]
    for call in (lambda: own.take(one, 1), lambda: own.check(one)):
        with pytest.raises(ApiError, match="max_concurrent 2"):
            call()
    own.take(one, 1, is_batch=True).close()
    for lease in leases:
        lease.close()
        lease.close()
    assert [own.take(one, 1) for _ in range(2)]


@settings(max_examples=50, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.integers(1, 120), st.floats(0, 30), st.floats(0, 1.5)), max_size=60
    )
)
def test_over_any_time_no_more_is_used_than_a_limit_and_what_time_brings(
    events: list[tuple[int, float, float]],
) -> None:
    clock, one = Clock(), tenant(tokens_per_minute=100)
    own, began, total = budgets(clock), 1000.0, 0.0
    for amount, wait, part in events:
        clock.now += wait
        try:
            lease = own.take(one, amount)
        except ApiError:
            continue
        used = min(amount, int(amount * part))
        lease.settle(amount, used)
        total += used
        assert total <= 100 + (clock.now - began) * 100 / 60 + 1e-6


def test_two_processes_count_as_one() -> None:
    counts, most = SharedCounts(), 200
    one = tenant(requests_per_minute=most)
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            own, taken = budgets(counts=SharedCounts(counts.descriptor)), 0
            for _ in range(most):
                try:
                    own.take(one, 1)
                    taken += 1
                except ApiError:
                    pass
            os._exit(taken)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(codes) == most


def test_more_tenants_than_slots_do_not_mix_and_open_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts_module, "NUM_SLOTS", 64)
    counts = SharedCounts()
    stays = tenant("stays", max_concurrent=1)
    own = budgets(counts=counts)
    own.take(stays, 1)
    for number in range(500):
        with counts.usage(f"guest-{number}", float(number)) as usage:
            assert usage.num_open == 0
            assert usage.meters == [[0.0, 0.0]] * 3
    with pytest.raises(ApiError):
        own.take(stays, 1)
    assert PROBES > 1


KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("budgets")
    limits = {
        "few": {"requests_per_minute": 2},
        "one": {"max_concurrent": 1},
        "tokens": {"tokens_per_minute": 1000},
        "anthropic": {"requests_per_minute": 1},
    }
    keys = [{"name": name, "hash": hash_of(name)} for name in [*limits, "free"]]
    (folder / "keys.json").write_text(json.dumps({"keys": keys, "tenants": limits}))
    config = ServerConfig(port=0, keys=str(folder / "keys.json"), shutdown_timeout=1.0)
    thread = ServerThread(FakeEngine(), config)
    yield thread
    thread.end()


def ask(server: Any, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 4, **body}
    if path == "/v1/messages":
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    return httpx.post(
        server.url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30
    )


def test_a_client_is_told_what_is_left_and_when_to_come_back(server: Any) -> None:
    answer = ask(server, "few")
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    answer = ask(server, "few", stream=True)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    refused = ask(server, "few")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert "x-ratelimit-limit-requests" not in ask(server, "free").headers


def test_anthropics_clients_are_told_in_their_words(server: Any) -> None:
    answer = ask(server, "anthropic", "/v1/messages")
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
    assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    refused = ask(server, "anthropic", "/v1/messages")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_tokens_are_taken_for_the_longest_answer_and_settled_by_the_real_one(server: Any) -> None:
    first = ask(server, "tokens", max_tokens=8)
    left = int(first.headers["x-ratelimit-remaining-tokens"])
    used = first.json()["usage"]["total_tokens"]
    assert left == 1000 - first.json()["usage"]["prompt_tokens"] - 8
    second = ask(server, "tokens", max_tokens=8)
    assert int(second.headers["x-ratelimit-remaining-tokens"]) <= left - used + 60
    refused = ask(server, "tokens", max_tokens=1000)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "request_exceeds_budget"
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert "retry-after" not in refused.headers
    assert UNSTATED_TOKENS < 1000


def test_an_open_request_counts_until_its_client_leaves(server: Any) -> None:
    server.engine.is_silent = True
    server.engine.begun.clear()
    url = httpx.URL(server.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    try:
        headers = {"Authorization": "Bearer one", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", '{"prompt": "x"}', headers)
        assert server.engine.begun.wait(30)
        assert ask(server, "one").status_code == 429
    finally:
        server.engine.is_silent = False
        connection.close()
    for _ in range(200):
        if ask(server, "one").status_code == 200:
            return
    raise AssertionError("the place of a client that has left is not given back")


def test_a_request_that_is_refused_costs_nothing(server: Any, tmp_path: Path) -> None:
    before = ask(server, "tokens", max_tokens=1).headers["x-ratelimit-remaining-tokens"]
    assert ask(server, "tokens", temperature=-5).status_code == 400
    after = ask(server, "tokens", max_tokens=1).headers["x-ratelimit-remaining-tokens"]
    assert int(after) >= int(before) - 8
