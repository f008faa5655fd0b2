"""Chats of thousands of messages before a guard: others do not stand still meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.observe.loop_holds import PROMISED_SECONDS
from octavo.server.protocol.decoding import MAX_RETURNED_VALUES
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine
from tests.server.guards.judges import SEEN

GUARD = "tests.server.guards.judges:strict_in_a_thread"
MOST = MAX_RETURNED_VALUES // 3
"""Messages: each is an object of two texts."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread[FakeEngine]]:
    config = ServerConfig(
        port=0,
        shutdown_timeout=1.0,
        guard=GUARD,
        guard_timeout=30.0,
        max_body_bytes=4 * 2**20,
        debug_loop_holds=True,
    )
    started = ServerThread(FakeEngine(), config)
    yield started
    started.end()


def longest_hold(server: ServerThread[FakeEngine]) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    [line] = [one for one in text.splitlines() if one.startswith("octavo:event_loop_longest")]
    return float(line.split()[1])


def asked(server: ServerThread[FakeEngine], num_messages: int, last: str) -> httpx.Response:
    messages = [{"role": "user", "content": f"x{place}"} for place in range(num_messages - 1)]
    messages.append({"role": "user", "content": last})
    body = {"messages": messages, "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.parametrize("last", ["good", "secret", "bad"])
def test_as_many_messages_as_a_guard_may_see_hold_nobody(
    server: ServerThread[FakeEngine], last: str
) -> None:
    SEEN.clear()
    told = asked(server, MOST - 1, last)
    assert len(SEEN[0].texts) == MOST - 1
    assert SEEN[0].texts[-1].text == last
    assert told.status_code == 400
    code = told.json()["error"]["code"]
    assert code == ("content_filter" if last == "bad" else "context_length_exceeded")
    # Ten times the promise: the machine of a test may be busy.
    assert longest_hold(server) < 10 * PROMISED_SECONDS


def test_more_messages_are_refused_before_a_guard_sees_them(
    server: ServerThread[FakeEngine],
) -> None:
    SEEN.clear()
    told = asked(server, 100_000, "good")
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "messages"
    assert f"more than {MAX_RETURNED_VALUES} values" in told.json()["error"]["message"]
    assert not SEEN
    assert longest_hold(server) < 10 * PROMISED_SECONDS
