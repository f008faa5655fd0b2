"""`truncation: auto`: what is left of a conversation that is too long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.server.truncation import Head, _ways, shorter
from tests.server.conftest import ServerThread
from tests.server.noting_engine import NotingEngine, NotingTokenizer

CONTEXT = 1024


class ShortEngine(NotingEngine):
    max_model_len = CONTEXT


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread[ShortEngine]]:
    server: ServerThread[ShortEngine] = ServerThread(ShortEngine(), ServerConfig(port=0))
    yield server
    server.end()


def ask(server: ServerThread[ShortEngine], **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/responses", json={"max_output_tokens": 8, **more})


def message(role: str, number: int, size: int = 50) -> dict[str, Any]:
    return {"role": role, "content": f"<{number}>" + size * "x"}


def numbers(server: ServerThread[ShortEngine]) -> list[int]:
    """Returns which messages the last prompt had."""
    tokenizer = server.engine.tokenizer
    assert isinstance(tokenizer, NotingTokenizer)
    return [int(one) for one in re.findall(r"<(\d+)>", tokenizer.prompt)]


def talk(num_messages: int) -> list[dict[str, Any]]:
    return [message("user" if n % 2 else "assistant", n) for n in range(1, num_messages + 1)]


def test_the_oldest_items_go_and_nothing_else(server: ServerThread[ShortEngine]) -> None:
    long = [message("developer", 0), *talk(41)]
    assert ask(server, input=long).json()["error"]["code"] == "context_length_exceeded"
    answer = ask(server, input=long, instructions="<1000>Be brief.", truncation="auto")
    assert answer.status_code == 200, answer.text
    assert answer.json()["truncation"] == "auto"
    first, system, *rest = numbers(server)
    assert (first, system) == (1000, 0)
    assert rest == list(range(rest[0], 42))
    assert rest[0] % 2 == 1, "begins with the user"
    tokens = answer.json()["usage"]["input_tokens"]
    assert CONTEXT // 2 < tokens <= CONTEXT - 8


def test_what_fits_stays_whole(server: ServerThread[ShortEngine]) -> None:
    assert ask(server, input=talk(5), truncation="auto").status_code == 200
    assert numbers(server) == [1, 2, 3, 4, 5]


def test_a_conversation_that_grows_keeps_its_beginning_for_many_turns(
    server: ServerThread[ShortEngine],
) -> None:
    begins = []
    for num_messages in range(41, 101, 2):
        ask(server, input=talk(num_messages), truncation="auto")
        begins.append(numbers(server)[0])
    assert begins == sorted(begins)
    assert len(set(begins)) < len(begins) / 2


def test_a_newest_turn_that_is_too_long_is_refused(server: ServerThread[ShortEngine]) -> None:
    long = [*talk(5), message("assistant", 6), message("user", 7, size=CONTEXT)]
    answer = ask(server, input=long, truncation="auto")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_calls_keep_their_results_and_what_the_user_said(
    server: ServerThread[ShortEngine],
) -> None:
    items = [message("user", 1), message("assistant", 2), message("user", 3)]
    for number in range(4, 60):
        call = {"call_id": f"call{number}", "type": "function_call", "name": "f"}
        items.append({**call, "arguments": json.dumps({"n": f"<{number}>"})})
        output = {"type": "function_call_output", "call_id": call["call_id"]}
        items.append({**output, "output": f"<{number}>" + 20 * "x"})
    answer = ask(server, input=items, truncation="auto")
    assert answer.status_code == 200, answer.text
    asked, *calls = numbers(server)
    assert asked == 3
    assert calls == [n for n in range(calls[0], 60) for _ in range(2)]
    assert calls[0] > 4


def test_what_a_store_has_before_is_cut_too(server: ServerThread[ShortEngine]) -> None:
    first = ask(server, input=talk(13)).json()
    more = {"previous_response_id": first["id"], "input": [message("user", 99, size=400)]}
    refused = ask(server, **more).json()["error"]
    assert refused["code"] == "context_length_exceeded"
    answer = ask(server, **more, truncation="auto")
    assert answer.status_code == 200, answer.text
    assert numbers(server)[-1] == 99
    assert 1 < numbers(server)[0] <= 13
    items = httpx.get(f"{server.url}/v1/responses/{answer.json()['id']}/input_items").json()
    assert len(items["data"]) == 1


CALL, OUTPUT = {"type": "function_call"}, {"type": "function_call_output"}


@st.composite
def conversations(draw: st.DrawFn) -> list[Head]:
    heads = [Head(role="system")] * draw(st.integers(0, 2))
    is_open: list[str] = []
    for number in range(draw(st.integers(1, 20))):
        kind = draw(st.sampled_from(["user", "assistant", "system", "reasoning", "call", "output"]))
        if kind == "call":
            is_open.append(str(number))
            heads.append(Head(**CALL, call_id=str(number)))
        elif kind == "output" and is_open:
            heads.append(
                Head(**OUTPUT, call_id=is_open.pop(draw(st.integers(0, 10)) % len(is_open)))
            )
        elif kind in ("user", "assistant", "system"):
            heads.append(Head(role=kind))
        else:
            heads.append(Head(type="reasoning"))
    return heads


@settings(max_examples=60, deadline=None)
@given(conversations())
@example([Head(role=role) for role in ("user", "user", "user", "system", "assistant")])
def test_no_call_is_parted_from_its_result(heads: list[Head]) -> None:
    before = len(heads)
    for way in shorter(heads):
        kept = way.of(range(len(heads)))
        assert kept == sorted(set(kept))
        assert len(kept) <= before, "never more"
        before = len(kept)
        calls = {one.call_id for place in kept if (one := heads[place]).type == CALL["type"]}
        outputs = {one.call_id for place in kept if (one := heads[place]).type == OUTPUT["type"]}
        assert outputs <= calls
        dropped = [one for place, one in enumerate(heads) if place not in kept]
        assert all(one.call_id not in outputs for one in dropped)
        assert kept[-1] == len(heads) - 1


def test_a_conversation_of_many_items_takes_time_by_its_length() -> None:
    sent = json.dumps([message("user", n, size=1) for n in range(20_000)]).encode()
    items, ways = _ways(sent, step=CONTEXT)
    assert len(items) == 20_000
    assert len(ways) < len(sent) // CONTEXT + 2
    assert [len(way.of(items)) for way in (ways[0], ways[-1])] == [19_971, 1]
