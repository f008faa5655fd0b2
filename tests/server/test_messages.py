"""Anthropic's API through its own client, on a server whose engine is scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import OverloadedError
from octavo.outputs import OutputDelta
from octavo.server.message_answers import whole_message
from octavo.server.protocol.message_blocks import chat_messages
from octavo.server.protocol.signatures import signature_of
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine, LongEngine
from tests.server.message_tools import ANSWER, FORMAT, USER, WEATHER, asked, call_block, head_of


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread[FakeEngine]]:
    config = ServerConfig(port=0, shutdown_timeout=1.0, api_key=("key",), max_body_bytes=2**22)
    found: ServerThread[FakeEngine] = ServerThread(LongEngine(), config)
    yield found
    found.end()


@pytest.fixture
def engine(server: ServerThread[FakeEngine]) -> FakeEngine:
    found = server.engine
    found.answer_format, found.answer, found.error, found.error_after = FORMAT, ANSWER, None, None
    found.requests.clear()
    return found


@pytest.fixture
def client(server: ServerThread[FakeEngine], engine: FakeEngine) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="key", max_retries=0, _strict_response_validation=True
    ) as strict:
        yield strict


@pytest.fixture
def http(server: ServerThread[FakeEngine], engine: FakeEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"x-api-key": "key"}) as plain:
        yield plain


def test_a_message_is_answered_in_blocks(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(tools=[WEATHER]))
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, *calls = message.content
    assert thinking.thinking == "I must look."  # type: ignore[union-attr]
    assert thinking.signature == signature_of("I must look.")  # type: ignore[union-attr]
    assert text.text == "Let me look."  # type: ignore[union-attr]
    assert [call.input["city"] for call in calls] == ["Rome", "Oslo"]  # type: ignore[union-attr]
    assert len({call.id for call in calls}) == 2  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.id.startswith("msg_")
    usage = message.usage
    assert usage.output_tokens == len(ANSWER)
    assert usage.cache_read_input_tokens == 16
    assert usage.input_tokens > 0
    assert message._request_id is not None
    assert message._request_id in message.id


def test_a_stream_tells_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**asked(tools=[WEATHER]))
    with client.messages.stream(**asked(tools=[WEATHER])) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    told = [message.model_dump() for message in (whole, streamed)]
    for one in told:
        one["id"] = ""
        for block in one["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert told[0] == told[1]


def test_an_async_client_streams_text(server: ServerThread[FakeEngine], engine: FakeEngine) -> None:
    engine.answer_format = engine.answer = None

    async def run() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="key") as client,
            client.messages.stream(**asked(max_tokens=5)) as stream,
        ):
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()
        assert message.stop_reason == "max_tokens"
        assert message.usage.output_tokens == 5
        return text

    assert len(asyncio.run(run())) == 5


def test_the_beta_route_and_a_bearer_are_taken(server: ServerThread[FakeEngine]) -> None:
    with anthropic.Anthropic(base_url=server.url, auth_token="key", api_key=None) as client:
        message = client.beta.messages.create(**asked(), betas=["interleaved-thinking-2025-05-14"])
    assert message.content


def test_thinking_goes_on_with_the_conversation_and_what_is_changed_does_not(
    client: anthropic.Anthropic,
) -> None:
    message = client.messages.create(**asked(tools=[WEATHER]))
    turn: dict[str, Any] = {"role": "assistant", "content": message.content}
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "21 degrees"}
        for block in message.content
        if block.type == "tool_use"
    ]
    history = [*USER, turn, {"role": "user", "content": results}]
    assert client.messages.create(**asked(messages=history, tools=[WEATHER])).content
    blocks = [block.model_dump() for block in message.content]
    [chat] = chat_messages([{"role": "assistant", "content": blocks}])
    assert chat["reasoning"] == "I must look."
    blocks[0]["thinking"] += "!"
    turn["content"] = blocks
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[1\]\.content\[0\]\.signature"):
        client.messages.create(**asked(messages=history, tools=[WEATHER]))


def test_thinking_that_is_not_shown_comes_back_all_the_same(client: anthropic.Anthropic) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    message = client.messages.create(**asked(thinking=thinking))
    block = message.content[0].model_dump()
    assert block["thinking"] == ""
    [chat] = chat_messages([{"role": "assistant", "content": [block]}])
    assert chat["reasoning"] == "I must look."
    with client.messages.stream(**asked(thinking=thinking)) as stream:
        assert not [event for event in stream if event.type == "thinking"]
        assert stream.get_final_message().content[0].model_dump() == block
    disabled = client.messages.create(**asked(thinking={"type": "disabled"}))
    assert [block.type for block in disabled.content] == ["text"]


def test_thinking_of_others_is_left_out() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "EqQBCgIYAh"},
        {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va"},
        {"type": "text", "text": "Warm."},
    ]
    [chat] = chat_messages([{"role": "assistant", "content": blocks}])
    assert chat == {"role": "assistant", "content": "Warm."}


def test_a_stop_sequence_is_named(engine: FakeEngine, http: httpx.Client) -> None:
    body = asked(stop_sequences=["END"], temperature=0.5, top_p=0.9, top_k=7, metadata={})
    assert http.post("/v1/messages", json=body).json()["stop_reason"] == "end_turn"
    [(_, params, _, _)] = engine.requests
    assert params.stop == ("END",)
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
    head = head_of("end")
    ended = OutputDelta(index=0, text="a", finish_reason="stop", stop_reason="END")
    message = whole_message(head, ended)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_max_tokens_beyond_the_context_are_what_it_has_left(
    engine: FakeEngine, http: httpx.Client
) -> None:
    engine.answer = "a" * 9000
    answer = http.post("/v1/messages", json=asked(max_tokens=32_000)).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"
    prompt = answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]
    assert answer["usage"]["output_tokens"] + prompt == LongEngine.max_model_len


def test_tokens_are_counted_as_the_prompt_has_them(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {
        "model": "fake",
        "messages": USER,
        "system": "Be brief.",
        "tools": [WEATHER],
    }
    counted = client.messages.count_tokens(**fields).input_tokens
    usage = client.messages.create(**fields, max_tokens=500).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_prefill_is_continued(http: httpx.Client) -> None:
    history = [*USER, {"role": "assistant", "content": "It is"}]
    assert http.post("/v1/messages", json=asked(messages=history)).status_code == 200


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("max_tokens", {"max_tokens": None}, "max_tokens is missing"),
    ("messages", {"messages": []}, "messages"),
    ("role", {"messages": [{"role": "tool", "content": ""}]}, r"messages[0].role"),
    ("content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        "image",
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages[0].content[0]: a block of type 'image' is not supported here",
    ),
    (
        "result of an assistant",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
            ]
        },
        "messages[0].content[0]",
    ),
    (
        "input",
        {"messages": [{"role": "assistant", "content": [{**call_block("a"), "input": "{}"}]}]},
        "messages[0].content[0].input must be an object",
    ),
    ("system", {"system": [{"type": "image"}]}, "system[0]"),
    (
        "server tool",
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0].type 'web_search_20250305' is not supported",
    ),
    ("no schema", {"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    (
        "schema",
        {"tools": [{"name": "a", "input_schema": {"properties": {"b": {"type": "text"}}}}]},
        "tools[0].input_schema.properties.b.type",
    ),
    ("name", {"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name must be"),
    ("same names", {"tools": [WEATHER, WEATHER]}, "tools[0] and tools[1] have the same name"),
    ("unknown tool field", {"tools": [{**WEATHER, "colour": 1}]}, "tools[0].colour"),
    ("no tools", {"tool_choice": {"type": "any"}}, "tool_choice is any, but there are no tools"),
    (
        "no such tool",
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}},
        "tool_choice names 'b'",
    ),
    ("budget", {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ("unknown", {"max_token": 5}, "'max_token' is an unknown field; did you mean max_tokens?"),
    ("stop", {"stop_sequences": [""]}, "stop_sequences[0]"),
    ("top_k", {"top_k": -2}, "top_k"),
    ("container", {"container": "id"}, "container is not supported"),
    ("effort", {"output_config": {"effort": "none"}}, "output_config.effort"),
    (
        "format",
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "text"}}}},
        "output_config.format",
    ),
]


@pytest.mark.parametrize(("fields", "told"), [x[1:] for x in WRONG], ids=[x[0] for x in WRONG])
def test_bad_input_is_told_in_anthropics_form(
    http: httpx.Client, fields: dict[str, Any], told: str
) -> None:
    response = http.post("/v1/messages", json=asked(**fields))
    found = response.json()
    assert response.status_code == 400
    assert found["type"] == "error"
    assert found["error"]["type"] == "invalid_request_error"
    assert told in found["error"]["message"]
    assert found["request_id"] == response.headers["request-id"]


def test_every_error_of_these_routes_has_anthropics_form(
    server: ServerThread[FakeEngine], engine: FakeEngine, http: httpx.Client
) -> None:
    def told(response: httpx.Response) -> tuple[int, str]:
        found = response.json()
        assert found.keys() == {"type", "error", "request_id"}, found
        return response.status_code, found["error"]["type"]

    path = "/v1/messages"
    assert told(httpx.post(server.url + path, json=asked())) == (401, "authentication_error")
    assert told(http.post(path, json=asked(model="other"))) == (404, "not_found_error")
    assert told(http.post(path + "/batches", json={})) == (404, "not_found_error")
    assert told(http.get(path)) == (405, "invalid_request_error")
    assert told(http.post(path, content=b"{")) == (400, "invalid_request_error")
    large = json.dumps(asked(system="a" * 2**22))
    response = http.post(path, content=large, headers={"content-type": "application/json"})
    assert told(response) == (413, "request_too_large")
    engine.error = OverloadedError("the queue is full")
    response = http.post(path, json=asked())
    assert told(response) == (529, "overloaded_error")
    assert "retry-after" in response.headers
    engine.error = ValueError("a bug")
    assert told(http.post(path, json=asked())) == (500, "api_error")
    assert "error" in http.post("/v1/chat/completions", json={}).json()
    assert "type" not in http.post("/v1/chat/completions", json={}).json()


def test_a_stream_that_fails_ends_with_an_error_event(
    engine: FakeEngine, client: anthropic.Anthropic
) -> None:
    engine.error_after = 30, OverloadedError("no room")
    with (
        pytest.raises(anthropic.APIStatusError, match="no room"),
        client.messages.stream(**asked()) as stream,
    ):
        list(stream)


def test_a_long_body_is_read_in_a_process_of_its_own(http: httpx.Client) -> None:
    history = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2000}]
    body = asked(messages=history, tools=[WEATHER], tool_choice={"type": "auto"})
    answer = http.post("/v1/messages", json=body).json()
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 4000
    history[0]["content"][7] = {"type": "image"}  # type: ignore[index]
    told = http.post("/v1/messages", json=asked(messages=history)).json()
    assert "messages[0].content[7]" in told["error"]["message"]
