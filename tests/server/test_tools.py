"""Tools and reasoning in chats, through OpenAI's clients on a server whose engine is scripted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.tools.detect import answer_format
from tests.server.chat_tools import CALL, TWO, WEATHER, joined
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine, LongEngine
from tests.server.strict_client import client_of

USER: list[Any] = [{"role": "user", "content": "How warm is Rome?"}]
CUSTOM: dict[str, Any] = {
    "type": "custom",
    "custom": {"name": "shell", "description": "Runs a line.", "format": {"type": "text"}},
}
CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[ServerThread[FakeEngine]]:
    config = ServerConfig(port=0, max_body_bytes=4 * 2**20, shutdown_timeout=1.0)
    found: ServerThread[FakeEngine] = ServerThread(LongEngine(), config)
    found.engine.answer_format = answer_format("<tool_call> </think>", {})
    found.engine.answer = TWO
    yield found
    found.end()


@pytest.fixture
def client(server: ServerThread[FakeEngine]) -> Iterator[openai.OpenAI]:
    with client_of(server.url) as strict:
        yield strict


def test_calls_of_an_answer_are_told_beside_its_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, tools=[WEATHER])  # type: ignore[list-item]
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2  # type: ignore[union-attr]
    arguments = [json.loads(call.function.arguments) for call in choice.message.tool_calls]  # type: ignore[union-attr]
    assert arguments == [{"city": "Rome", "days": 2}, {"city": "Oslo", "days": 2}]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_stream_tells_the_same_calls_piece_by_piece(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="fake", messages=USER, tools=[WEATHER], stream=True)  # type: ignore[call-overload]
    )
    content, calls, reason = joined(chunks)
    assert content == "Let me look."
    assert reason == "tool_calls"
    assert [json.loads(call["arguments"])["city"] for call in calls] == ["Rome", "Oslo"]
    pieces = [chunk for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert len(pieces) > 20


def test_a_content_of_calls_alone_is_null(
    server: ServerThread[FakeEngine], client: openai.OpenAI
) -> None:
    server.engine.answer = CALL
    answer = client.chat.completions.create(model="fake", messages=USER, tools=[WEATHER])  # type: ignore[list-item]
    assert answer.choices[0].message.content is None


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": []}])
def test_without_tools_to_call_a_call_is_text(client: openai.OpenAI, more: dict[str, Any]) -> None:
    options = {"tools": [WEATHER], **more}
    answer = client.chat.completions.create(model="fake", messages=USER, **options)
    assert answer.choices[0].message.content == TWO
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_alone_where_parallel_ones_are_not_wanted(
    client: openai.OpenAI, stream: bool
) -> None:
    answer: Any = client.chat.completions.create(  # type: ignore[call-overload]
        model="fake", messages=USER, tools=[WEATHER], parallel_tool_calls=False, stream=stream
    )
    calls = joined(list(answer))[1] if stream else answer.choices[0].message.tool_calls
    assert len(calls) == 1


async def test_the_async_client_streams_calls_too(server: ServerThread[FakeEngine]) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True
    ) as client:
        whole = await client.chat.completions.create(
            model="fake",
            messages=USER,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        stream: Any = await client.chat.completions.create(  # type: ignore[call-overload]
            model="fake", messages=USER, tools=[WEATHER], stream=True, n=1
        )
        _, calls, _ = joined([chunk async for chunk in stream])
    assert whole.choices[0].message.tool_calls is not None
    assert [call.function.arguments for call in whole.choices[0].message.tool_calls] == [  # type: ignore[union-attr]
        call["arguments"] for call in calls
    ]


def test_custom_tools_get_their_input(server: ServerThread[FakeEngine]) -> None:
    server.engine.answer = (
        '<tool_call>{"name": "shell", "arguments": {"input": "ls \\"x\\"\\n"}}</tool_call>' + CALL
    )
    body = {"messages": USER, "tools": [CUSTOM, WEATHER]}
    answer = httpx.post(server.url + CHAT, json=body).json()
    first, second = answer["choices"][0]["message"]["tool_calls"]
    assert first["type"] == "custom"
    assert first["custom"] == {"name": "shell", "input": 'ls "x"\n'}
    assert second["type"] == "function"
    with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    customs = [part["custom"] for part in parts if part["index"] == 0]
    assert customs[0]["name"] == "shell"
    assert "".join(custom["input"] for custom in customs) == 'ls "x"\n'


THOUGHT = "<think>\nRome is in Italy.\n</think>\n\nIt is warm."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_reasoning_is_told_apart(
    server: ServerThread[FakeEngine], client: openai.OpenAI, stream: bool, tools: list[Any]
) -> None:
    server.engine.answer = THOUGHT
    answer: Any = client.chat.completions.create(
        model="fake", messages=USER, stream=stream, extra_body={"tools": tools}
    )
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        told = [(delta.content or "", getattr(delta, "reasoning", "")) for delta in deltas]
        content, reasoning = ("".join(parts) for parts in zip(*told, strict=True))
        again = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    else:
        message = answer.choices[0].message
        content, reasoning, again = message.content, message.reasoning, message.reasoning_content
    assert (content, reasoning, again) == ("It is warm.", *["Rome is in Italy."] * 2)


def test_reasoning_may_be_left_out_or_left_in(
    server: ServerThread[FakeEngine], client: openai.OpenAI
) -> None:
    server.engine.answer = THOUGHT

    def message(**more: Any) -> Any:
        answer = client.chat.completions.create(model="fake", messages=USER, extra_body=more)
        return answer.choices[0].message

    assert message(include_reasoning=False).content == "It is warm."
    assert not hasattr(message(include_reasoning=False), "reasoning")
    assert message(separate_reasoning=False).content == THOUGHT


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_the_tokens_of_the_reasoning(
    server: ServerThread[FakeEngine], client: openai.OpenAI, stream: bool
) -> None:
    # A token of the fake engine is a character, so the markers are characters here.
    found = answer_format(
        "</think>", {"<think>": 60, "</think>": 62}, token_id={"<think>": 60, "</think>": 62}.get
    )
    server.engine.answer_format = found
    server.engine.answer = "<abc>Yes"
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    answer: Any = client.chat.completions.create(
        model="fake", messages=USER, stream=stream, extra_body=more
    )
    usage = [chunk.usage for chunk in answer][-1] if stream else answer.usage
    assert usage.completion_tokens == 8
    assert usage.completion_tokens_details.reasoning_tokens == 5


def test_an_answer_cut_off_within_a_call_has_what_there_is(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=USER,
        tools=[WEATHER],
        max_tokens=80,  # type: ignore[list-item]
    )
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Rome", "'  # type: ignore[union-attr]


def test_tools_reach_the_prompt_of_a_template_that_knows_none(
    server: ServerThread[FakeEngine],
) -> None:
    history = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
    ]
    prompts = []
    for choice in ("auto", "none"):
        body = {"messages": history, "tools": [WEATHER], "add_generation_prompt": True}
        ids = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
        prompts.append("".join(map(chr, ids)))
        body = {"messages": history, "tools": [WEATHER], "tool_choice": choice}
        used = httpx.post(server.url + CHAT, json=body).json()["usage"]["prompt_tokens"]
        assert used == len(ids)
    prompt = prompts[0]
    assert prompts[1] == prompt
    assert '"name": "get_weather"' in prompt
    assert '{"name": "get_weather", "arguments": {"city":"Rome"}}' in prompt
    assert "<tool_response>\n21 degrees\n</tool_response>" in prompt


def tool(name: object = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [tool(), tool()]}, "tools"),
    ({"tools": [tool("no space here")]}, "tools[0].function.name"),
    ({"tools": [tool(5)]}, "tools[0].function.name"),
    ({"tools": [tool("x" * 200)]}, "tools[0].function.name"),
    ({"tools": [tool(), "f"]}, "tools[1]"),
    ({"tools": [tool(parameters="none")]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
    (
        {"tools": [tool(parameters={"properties": {"a": {"type": "text"}}})]},
        "tools[0].function.parameters.properties.a.type",
    ),
    (
        {"tools": [tool(parameters={"properties": {"a": 5}})]},
        "tools[0].function.parameters.properties.a",
    ),
    ({"tools": [tool(parameters={"required": "a"})]}, "tools[0].function.parameters.required"),
    ({"tools": [tool(parameters={"anyOf": {}})]}, "tools[0].function.parameters.anyOf"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (
        {"tools": [{"type": "custom", "custom": {"name": "f", "format": "x"}}]},
        "tools[0].custom.format",
    ),
    ({"tools": [tool(str(n).replace("", "n")) for n in range(10000)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice"),
    (
        {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "tool_choice.allowed_tools",
    ),
    ({"tools": [tool()], "functions": [{}]}, "functions"),
]


@pytest.mark.parametrize(("more", "param"), BAD, ids=[f"{n} {one[1]}" for n, one in enumerate(BAD)])
def test_tools_that_are_none_are_refused_by_place(
    server: ServerThread[FakeEngine], more: dict[str, Any], param: str
) -> None:
    answer = httpx.post(server.url + CHAT, json={"messages": USER, **more})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not server.engine.requests


BAD_CALLS: list[tuple[Any, str]] = [
    ("x", "messages[1].tool_calls"),
    ([5], "messages[1].tool_calls[0]"),
    ([{"type": "function"}], "messages[1].tool_calls[0].function"),
    ([tool(5)], "messages[1].tool_calls[0].function.name"),
    ([tool("f", arguments=7)], "messages[1].tool_calls[0].function.arguments"),
    ([{**tool("f", arguments=""), "id": 7}], "messages[1].tool_calls[0].id"),
]


@pytest.mark.parametrize(("calls", "param"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_calls_in_the_history_are_checked(
    server: ServerThread[FakeEngine], calls: Any, param: str
) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    answer = httpx.post(server.url + CHAT, json={"messages": [*USER, message, *USER]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_arguments_that_are_no_json_come_back_as_they_were(
    server: ServerThread[FakeEngine],
) -> None:
    call = {**tool("f", arguments='{"a": '), "id": "1"}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = {"messages": [*USER, message, {"role": "tool", "tool_call_id": "1", "content": "?"}]}
    ids = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
    assert '"arguments": "{\\"a\\": "' in "".join(map(chr, ids))


async def test_many_large_tools_hold_nobody_up(server: ServerThread[FakeEngine]) -> None:
    properties = {f"p{n}": {"type": "string", "description": "x" * 60} for n in range(30)}
    tools = [tool(f"tool_{n}", parameters={"properties": properties}) for n in range(1000)]
    server.engine.answer = "Yes"
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        large = asyncio.create_task(client.post(CHAT, json={"messages": USER, "tools": tools}))
        longest = 0.0
        while not large.done():
            begun = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            longest = max(longest, time.monotonic() - begun)
            await asyncio.sleep(0.01)
    assert (await large).status_code == 400  # the context of the fake engine is small
    assert longest < 5
