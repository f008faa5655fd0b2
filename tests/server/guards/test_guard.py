"""A guard before and after generation, as clients of every API and operators meet it."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.guard import GuardCheck
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine
from tests.server.guards.calls import MODULE, chat, complete
from tests.server.guards.judges import RELEASE, SEEN


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    SEEN.clear()
    RELEASE.clear()
    yield
    RELEASE.set()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[Any, ServerThread[FakeEngine]]]:
    started: dict[Any, ServerThread[FakeEngine]] = {}
    yield started
    RELEASE.set()
    for server in started.values():
        server.end()


@pytest.fixture
def guarded(servers: dict[Any, ServerThread[FakeEngine]]) -> Any:
    """A function that returns a server with a guard and an answer of the model; those of the same
    options are one."""

    def start(name: str = "strict", answer: str | None = "hello", **options: Any) -> Any:
        key = (name, *sorted(options.items()))
        if key not in servers:
            config = ServerConfig(port=0, shutdown_timeout=1.0, guard=f"{MODULE}:{name}", **options)
            servers[key] = ServerThread(FakeEngine(), config)
        engine = servers[key].engine
        engine.answer, engine.is_endless = answer, False
        engine.requests.clear()
        engine.aborted.clear()
        return servers[key]

    return start


def events(response: httpx.Response) -> list[Any]:
    lines = [one[6:] for one in response.text.splitlines() if one.startswith("data: ")]
    return [json.loads(one) for one in lines if one != "[DONE]"]


def checks(stage: str) -> list[GuardCheck]:
    return [one for one in SEEN if one.stage == stage]


def series(server: Any) -> dict[str, float]:
    page = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r"^(octavo:guard\S*) (\S+)$", page, re.M)
    return {name: float(value) for name, value in found}


def test_a_guard_is_told_who_asks_and_for_what(guarded: Any) -> None:
    server = guarded("watcher", served_model_name=("m",))
    headers = {"X-Request-Id": "abc"}
    body = {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}]
    }
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
    before, after = SEEN
    assert [(one.role, one.place, one.text) for one in before.texts] == [
        ("system", "messages[0].content", "be kind"),
        ("user", "messages[1].content", "q"),
    ]
    assert [(one.role, one.place, one.text) for one in after.texts] == [
        ("assistant", "choices[0]", "hello")
    ]
    for one in SEEN:
        assert (one.request_id, one.route, one.model) == ("abc", "/v1/chat/completions", "m")
    assert (before.stage, after.stage, after.is_last) == ("input", "output", True)


REFUSED_INPUTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "bad"}]},
    "/v1/completions": {"prompt": "bad"},
    "/v1/responses": {"input": "bad"},
    "/invocations": {"prompt": "bad"},
}


@pytest.mark.parametrize("path", REFUSED_INPUTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["strict", "strict_in_a_thread"])
def test_a_refused_input_is_an_error_before_anything_runs(
    guarded: Any, path: str, stream: bool, name: str
) -> None:
    server = guarded(name)
    response = httpx.post(f"{server.url}{path}", json={**REFUSED_INPUTS[path], "stream": stream})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["type"]) == ("content_filter", "invalid_request_error")
    assert "a bad word" in error["message"]
    assert error["param"] in ("messages", "prompt", "input")
    assert not server.engine.requests


def test_a_refused_input_has_anthropics_form_where_that_is_spoken(guarded: Any) -> None:
    body = {"messages": [{"role": "user", "content": "bad"}], "max_tokens": 5}
    response = httpx.post(f"{guarded().url}/v1/messages", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "ad"}],
            }
        ],
        [
            {"role": "assistant", "content": "", "reasoning": "bad"},
            {"role": "user", "content": "x"},
        ],
        [
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a": "bad"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        [{"role": "tool", "tool_call_id": "x", "content": "bad"}],
        [{"role": "tool", "tool_call_id": "not an id but bad", "content": "x"}],
        [{"role": "user", "name": "bad", "content": "x"}],
    ],
    ids=["parts", "reasoning", "call", "result", "id", "name"],
)
def test_no_part_of_a_message_goes_round_the_guard(guarded: Any, messages: Any) -> None:
    server = guarded()
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages})
    assert response.json()["error"]["code"] == "content_filter"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": "bad"}}]},
        {"chat_template_kwargs": {"x": ["bad"]}},
    ],
    ids=["tools", "template"],
)
def test_what_the_template_gets_beside_messages_is_shown(guarded: Any, fields: Any) -> None:
    assert chat(guarded(), **fields).json()["error"]["code"] == "content_filter"


def test_token_ids_are_shown_as_text_and_rewritten_as_ids(guarded: Any) -> None:
    server = guarded()
    assert complete(server, [ord(one) for one in "bad"]).json()["error"]["code"] == "content_filter"
    found = complete(server, [[ord(one) for one in "a secret"]], echo=True, return_token_ids=True)
    [choice] = found.json()["choices"]
    assert choice["text"] == "a XXhello"
    assert choice["prompt_token_ids"] == [ord(one) for one in "a XX"]


def test_a_rewritten_chat_is_what_the_model_reads(guarded: Any) -> None:
    found = chat(guarded(), "my secret", return_token_ids=True).json()
    assert "".join(map(chr, found["prompt_token_ids"])).endswith("user:my XX\nassistant:")


def test_a_long_chat_is_judged_too(guarded: Any) -> None:
    server = guarded(max_body_bytes=2**20)
    words = [{"role": "user", "content": "x"}] * 20_000  # parsed in another process
    body = {
        "messages": [*words, {"role": "user", "content": "bad"}, {"role": "user", "content": ""}]
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.json()["error"]["code"] == "content_filter"


def test_several_prompts_are_one_check(guarded: Any) -> None:
    server = guarded("watcher")
    complete(server, ["one", "two"], n=2)
    [before] = checks("input")
    assert [one.place for one in before.texts] == ["prompt[0]", "prompt[1]"]
    assert sorted(one.index for one in checks("output")) == [0, 1, 2, 3]


def test_a_whole_answer_is_shown_at_once_and_refused_with_the_reason(guarded: Any) -> None:
    server = guarded(answer="well, bad")
    found = chat(server).json()["choices"][0]
    assert found["finish_reason"] == "content_filter"
    assert found["stop_reason"] == "a bad word"
    assert found["message"]["content"] == ""
    assert [one.texts[0].text for one in checks("output")] == ["well, bad"]


def test_a_rewritten_answer_tells_nothing_of_what_was_there(guarded: Any) -> None:
    server = guarded(answer="a secret b")
    found = complete(server, logprobs=2, return_token_ids=True).json()["choices"][0]
    assert found["text"] == "a XX b"
    assert "".join(map(chr, found["token_ids"])) == "a XX b"
    assert found["logprobs"]["tokens"] == []


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_stream_is_told_what_its_windows_allow(guarded: Any, window: int) -> None:
    server = guarded(answer="one two three bad four", guard_window=window)
    told = events(complete(server, stream=True))
    text = "".join(one["choices"][0]["text"] for one in told)
    assert "one two three bad".startswith(text)
    assert "bad" not in text
    last = told[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("content_filter", "a bad word")
    windows = [one.texts[0].text for one in checks("output")]
    assert all(len(one) >= window for one in windows[:-1])
    assert "".join(windows[:-1]) == text


def test_a_window_knows_what_the_client_has_already(guarded: Any) -> None:
    server = guarded("slow", answer="abcdefghij", guard_window=2)
    told = events(chat(server, stream=True))
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told) == "abcdefghij"
    so_far = ""
    for one in checks("output"):
        assert one.before == so_far
        so_far += one.texts[0].text
    assert [one.is_last for one in checks("output")][-1]
    assert so_far == "abcdefghij"


def test_a_window_of_zero_holds_the_whole_stream_back(guarded: Any) -> None:
    server = guarded(answer="a very secret thing", guard_window=0)
    told = events(complete(server, stream=True))
    assert [one["choices"][0]["text"] for one in told] == ["a very XX thing"]


def test_each_of_several_answers_is_judged_alone(guarded: Any) -> None:
    server = guarded(answer=None, guard_window=3)  # each answer begins with another letter
    told = events(complete(server, n=3, max_tokens=4, stream=True))
    texts = ["", "", ""]
    for one in told:
        texts[one["choices"][0]["index"]] += one["choices"][0]["text"]
    plain = complete(server, n=3, max_tokens=4).json()["choices"]
    assert texts == [one["text"] for one in plain]
    assert [one["choices"][0]["finish_reason"] for one in told].count("length") == 3


def test_the_engine_stops_when_a_stream_is_refused(guarded: Any) -> None:
    server = guarded(guard_window=2)
    server.engine.answer, server.engine.is_endless = "bad" * 200, True
    told = events(complete(server, stream=True, max_tokens=500))
    assert told[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert server.engine.aborted.wait(10)
    assert server.engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_a_check_leaves_nothing_behind(
    guarded: Any, stream: bool
) -> None:
    server = guarded("hanging_async", guard_stages="output", guard_window=2, guard_timeout=30.0)
    body = {"prompt": "x", "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    assert checks("output")
    deadline = time.monotonic() + 10
    while series(server)["octavo:guard_checks_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.engine.num_running == 0


def test_responses_are_incomplete_and_messages_refusals(guarded: Any) -> None:
    server = guarded(answer="is bad")
    for stream in (False, True):
        found = httpx.post(f"{server.url}/v1/responses", json={"input": "x", "stream": stream})
        told = events(found)[-1]["response"] if stream else found.json()
        assert told["status"] == "incomplete"
        assert told["incomplete_details"] == {"reason": "content_filter"}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
    found = httpx.post(f"{server.url}/v1/messages", json=body).json()
    assert (found["stop_reason"], found["stop_sequence"], found["content"]) == ("refusal", None, [])
    told = events(httpx.post(f"{server.url}/v1/messages", json={**body, "stream": True}))
    [ended] = [one for one in told if one["type"] == "message_delta"]
    assert ended["delta"]["stop_reason"] == "refusal"


def test_a_guard_of_inputs_alone_does_not_see_answers(guarded: Any) -> None:
    server = guarded("strict", answer="bad", guard_stages="input")
    assert complete(server).json()["choices"][0]["text"] == "bad"
    assert not checks("output")


def test_a_guard_of_outputs_alone_does_not_see_prompts(guarded: Any) -> None:
    server = guarded("strict", guard_stages="output")
    assert complete(server, "bad").status_code == 200
    assert not checks("input")


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("broken", "error"),
        ("senseless", "error"),
        ("cancelled", "error"),
        ("too_many", "error"),
        ("hanging", "timeout"),
    ],
)
def test_a_guard_that_gives_no_verdict_closes_the_server_or_opens_it(
    guarded: Any, name: str, outcome: str
) -> None:
    closed = guarded(name, guard_timeout=0.1)
    response = complete(closed)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_unavailable"
    assert response.headers["retry-after"]
    assert not closed.engine.requests
    label = f'octavo:guard_checks_total{{outcome="{outcome}",stage="input"}}'
    assert series(closed)[label] == 1
    opened = guarded(name, guard_timeout=0.1, guard_fail_open=True)
    assert complete(opened).json()["choices"][0]["text"] == "hello"
    assert series(opened)[label] == 1
    assert series(opened)[label.replace("input", "output")] == 1


def test_an_answer_that_nobody_can_judge_is_an_error(guarded: Any) -> None:
    server = guarded("broken", guard_stages="output", guard_window=2)
    assert complete(server).status_code == 503
    response = complete(server, stream=True)
    assert response.status_code == 503  # nothing had gone out
    assert server.engine.num_running == 0


def test_checks_at_once_and_in_waiting_are_bounded(guarded: Any) -> None:
    server = guarded(
        "hanging",
        guard_timeout=5.0,
        guard_max_concurrent=2,
        guard_max_waiting=1,
        guard_stages="input",
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, server) for _ in range(4)]
        done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
        [full] = done
        assert full.result().status_code == 503
        assert len(SEEN) == 2
        found = series(server)
        assert found["octavo:guard_checks_running"] == 2
        assert found["octavo:guard_checks_waiting"] == 1
        RELEASE.set()
        assert sorted(one.result().status_code for one in asked) == [200, 200, 200, 503]
    assert series(server)['octavo:guard_checks_total{outcome="full",stage="input"}'] == 1


def test_hung_checks_keep_their_places_after_their_time(guarded: Any) -> None:
    server = guarded("hanging", guard_timeout=0.1, guard_max_concurrent=1, guard_stages="input")
    for _ in range(3):
        assert complete(server).status_code == 503
    assert len(SEEN) == 1  # the others never had a turn
    RELEASE.set()
