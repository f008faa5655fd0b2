"""The Responses API through OpenAI's clients, on servers whose engine is scripted, and on a real
one of random weights."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.engine.chat_template import ChatRenderer
from octavo.errors import EngineDeadError
from octavo.outputs import OutputDelta
from octavo.server.protocol.parsing import parse
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_answer import ResponseAnswer, ResponseEvents
from octavo.tools.answers import reading_of
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine, LongEngine
from tests.server.response_events import checked, parsed
from tests.server.response_tools import ANSWER, CALL, FORMAT, RUN, SHELL, TOOLS, WEATHER
from tests.server.strict_client import client_of
from tests.server.templates import THINKS

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerThread[FakeEngine]]:
    server: ServerThread[FakeEngine] = ServerThread(LongEngine(), ServerConfig(port=0))
    server.engine.answer_format = FORMAT
    yield server
    server.end()


@pytest.fixture
def server(shared: ServerThread[FakeEngine]) -> Iterator[ServerThread[FakeEngine]]:
    """The scripted server, with the script that most tests want."""
    shared.engine.answer = ANSWER
    yield shared
    shared.engine.error_after = shared.engine.finish_reason = None
    shared.engine.is_endless = False


@pytest.fixture
def client(server: ServerThread[FakeEngine]) -> Iterator[openai.OpenAI]:
    with client_of(server.url) as strict:
        yield strict


def ask(client: openai.OpenAI, **more: Any) -> Any:
    options = {"model": "fake", "input": "How warm is Rome?", "tools": TOOLS, **more}
    return client.responses.create(**options)


def told(response: Any) -> list[Any]:
    """Returns the items without their ids."""
    found = response if isinstance(response, dict) else json.loads(response.model_dump_json())
    ids = {"id": None, "call_id": None}
    return [{**item, **ids} for item in found["output"]]


def test_an_answer_is_told_in_items(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.status == "completed"
    assert [item.type for item in answer.output] == [
        *("reasoning", "message", "function_call", "custom_tool_call")
    ]
    thought, message, call, run = answer.output
    assert [part.text for part in thought.content] == ["Which city? Rome."]
    assert thought.encrypted_content is None
    assert answer.output_text == message.content[0].text == "Let me look."
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Rome",  "days": 2}')
    assert (run.name, run.input) == ("shell", 'ls "a"')
    assert len({item.id for item in answer.output}) == 4
    assert answer.usage.input_tokens_details.cached_tokens == 16
    assert answer.usage.output_tokens == len(ANSWER)
    assert (answer.tools[0].name, answer.tool_choice, answer.store) == (
        "get_weather",
        "auto",
        True,
    )


def test_an_answer_is_as_described(server: ServerThread[FakeEngine]) -> None:
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    body = {
        "input": "Hi",
        "tools": TOOLS,
        "metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }
    answer = httpx.post(f"{server.url}{PATH}", json=body)
    assert answer.status_code == 200, answer.text
    jsonschema_rs.validate(schemas["Response"], answer.json())


@pytest.mark.parametrize(
    "more", [{}, {"top_logprobs": 2}, {"include": ["reasoning.encrypted_content"]}]
)
def test_a_stream_tells_the_same_in_events(
    server: ServerThread[FakeEngine], client: openai.OpenAI, more: dict[str, Any]
) -> None:
    list(ask(client, stream=True, **more))  # of the types that the client knows
    body = {"input": "How warm is Rome?", "tools": TOOLS, "stream": True, **more}
    text = httpx.post(f"{server.url}{PATH}", json=body).text
    assert "[DONE]" not in text
    last = checked(parsed(text))
    whole = httpx.post(f"{server.url}{PATH}", json={**body, "stream": False}).json()
    assert told(last) == told(whole)
    assert last["usage"] == whole["usage"]
    if "top_logprobs" in more:
        [part] = last["output"][1]["content"]
        assert "".join(one["token"] for one in part["logprobs"]) == part["text"]


async def test_the_async_client_streams_too(server: ServerThread[FakeEngine]) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        async with client.responses.stream(model="fake", input="Hi", tools=TOOLS) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[-1] == "response.completed"
        assert [item.type for item in final.output][2:] == ["function_call", "custom_tool_call"]
        again = await client.responses.create(
            model="fake",
            input=[*final.output, *_results(final)],  # type: ignore[list-item]
        )
        assert again.status == "completed"


def _results(response: Any) -> list[dict[str, Any]]:
    return [
        {"type": f"{item.type}_output", "call_id": item.call_id, "output": "done"}
        for item in response.output
        if item.type in ("function_call", "custom_tool_call")
    ]


def test_a_packed_reasoning_is_all_that_must_come_back(client: openai.OpenAI) -> None:
    answer = ask(client, include=["reasoning.encrypted_content"])
    thought = answer.output[0].model_dump(exclude={"content"}, exclude_none=True)
    body = ResponsesRequest.model_construct(input=[thought])
    assert body.chat.template_messages()[0]["reasoning"] == "Which city? Rome."


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    answer = ask(client, max_output_tokens=35)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in answer.output] == ["completed", "incomplete"]
    *_, last = ask(client, max_output_tokens=35, stream=True)
    assert last.type == "response.incomplete"
    assert told(last.response) == told(answer)


def test_an_answer_of_nothing_is_an_empty_text(
    server: ServerThread[FakeEngine], client: openai.OpenAI
) -> None:
    server.engine.answer = "<think>Hm.</think>"
    answer = ask(client)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output_text == ""


def test_a_stream_that_fails_says_so_twice(server: ServerThread[FakeEngine]) -> None:
    server.engine.error_after = (40, EngineDeadError("the engine process ended"))
    body = {"input": "Hi", "stream": True}
    events = parsed(httpx.post(f"{server.url}{PATH}", json=body).text)
    last = checked(events)
    assert (events[-2]["type"], events[-2]["code"]) == ("error", "engine_dead")
    assert last["status"] == "failed"
    assert last["error"] == {"code": "server_error", "message": "the engine process ended"}
    assert last["output"][-1]["status"] == "incomplete"


def test_an_early_error_keeps_its_status(server: ServerThread[FakeEngine]) -> None:
    server.engine.error_after = (0, EngineDeadError("the engine process ended"))
    answer = httpx.post(f"{server.url}{PATH}", json={"input": "Hi", "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


def test_a_client_that_leaves_ends_its_response(server: ServerThread[FakeEngine]) -> None:
    server.engine.is_endless = True
    server.engine.answer = None
    server.engine.aborted.clear()
    body = {"input": "Hi", "stream": True}
    with httpx.stream("POST", f"{server.url}{PATH}", json=body) as stream:
        next(stream.iter_lines())
    assert server.engine.aborted.wait(10)


def test_a_long_body_is_parsed_elsewhere_and_comes_to_the_same(
    server: ServerThread[FakeEngine],
) -> None:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = {"input": turn * 200, "tools": TOOLS, "store": False}
    answer = httpx.post(f"{server.url}{PATH}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["tools"] == TOOLS
    prompt = "user:a\nassistant:b\n" * 200 + "assistant:"
    assert answer.json()["usage"]["input_tokens"] >= len(prompt)
    body["input"] = [*turn * 200, {"type": "web_search_call"}]
    refused = httpx.post(f"{server.url}{PATH}", json=body).json()["error"]
    assert refused["param"] == "input[400].type"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{**SHELL, "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tool_choice": {"type": "function", "name": "f"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "text.format"),
        ({"text": {"form": {}}}, "text.form"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"input": "a" * 9000}, "input"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    server: ServerThread[FakeEngine], body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{server.url}{PATH}", json={"input": "Hi", **body} if body else body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert re.search(rf"(?<!\w){re.escape(param.split('[')[0])}", error["message"])


PIECES = [
    "a",
    " b\n",
    "<think>",
    "</think>",
    CALL,
    RUN,
    "<tool_call>",
    "</tool_call>",
    "{",
    "\xe9\U0001f600",
]


def deltas_of(text: str, sizes: list[int], reason: str) -> list[OutputDelta]:
    """Returns an answer in pieces of these sizes, over and over."""
    found, place, turn = [], 0, 0
    while place < len(text) or not found:
        size = sizes[turn % len(sizes)]
        piece = text[place : place + size]
        found.append(OutputDelta(index=0, text=piece, token_ids=[1] * len(piece)))
        place, turn = place + size, turn + 1
    found[-1].finish_reason = reason
    return found


def response_of(deltas: list[OutputDelta]) -> list[dict[str, Any]]:
    """Returns the events of an answer that comes in these rounds."""
    return answer_of(parse(ResponsesRequest, {"input": "Hi", "tools": TOOLS}), deltas)


def answer_of(body: ResponsesRequest, deltas: list[OutputDelta]) -> list[dict[str, Any]]:
    """Returns the same for a request of its own."""
    reading = reading_of(FORMAT, body.chat.tool_set(), "")
    state: Any = SimpleNamespace(model_name="fake")
    params = SimpleNamespace(temperature=1.0, top_p=1.0, n=1)
    call: Any = SimpleNamespace(params=params, created=1, requests=[SimpleNamespace(prompt_len=3)])
    writer = ResponseEvents(ResponseAnswer(state, body, call, reading), body, _at_once)
    pieces: list[Any] = [writer.events([(0, one, False)]) for one in deltas]
    return parsed(b"".join([*pieces, asyncio.run(writer.end())]).decode())


async def _at_once() -> None:
    pass


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.sampled_from(["stop", "length"]),
)
def test_the_events_of_any_answer_join_to_its_items(
    text: str, sizes: list[int], reason: str
) -> None:
    last = checked(response_of(deltas_of(text, sizes, reason)))
    whole = checked(response_of(deltas_of(text, [len(text) + 1], reason)))
    assert told(last) == told(whole)
    assert last["status"] == {"stop": "completed", "length": "incomplete"}[reason]


@pytest.mark.parametrize("is_packed", [False, True])
def test_reasoning_and_arguments_come_back_in_the_words_of_the_model(is_packed: bool) -> None:
    renderer = ChatRenderer(THINKS, {}, ())
    include = ["reasoning.encrypted_content"] if is_packed else []
    items: list[Any] = [{"role": "user", "content": "What does it say?"}]
    for turn in range(4):
        body = parse(ResponsesRequest, {"input": items, "tools": TOOLS, "include": include})
        before = body.chat.render(renderer).text
        given = f'{{"city": "\xe9/{turn}",  "days": [1, 2.5]}}'
        call = f'<tool_call>\n{{"name": "get_weather", "arguments": {given}}}\n</tool_call>'
        text = f"<think>\nTurn {turn}.\n</think>\n\nLook.\n{call}\n{RUN}"
        answer = answer_of(body, deltas_of(text, [7], "stop"))[-1]["response"]["output"]
        if is_packed:
            del answer[0]["content"]
        items += [
            *answer,
            *_results(SimpleNamespace(output=[SimpleNamespace(**o) for o in answer])),
        ]
        now = parse(ResponsesRequest, {"input": items, "tools": TOOLS}).chat.render(renderer).text
        assert now.startswith(before + text)
