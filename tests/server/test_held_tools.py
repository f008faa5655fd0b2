"""A real engine of random weights behind a server: told to call a tool, it calls it rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import ServerConfig
from tests.server.conftest import ServerThread
from tests.server.strict_client import client_of
from tests.server.tiny_engine import tiny_engine

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} <tool_call> {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}, "on": {"type": "boolean"}},
    "required": ["level", "on"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "lamp", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "fan", "parameters": SCHEMA}},
]
FAN: Any = {"type": "function", "function": {"name": "fan"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    engine = tiny_engine(tmp_path_factory.mktemp("held"), chat_template=TEMPLATE)
    server: ServerThread[AsyncLLM] = ServerThread(engine, ServerConfig(port=0))
    with client_of(server.url) as strict:
        yield strict
    server.end()


def ask(client: openai.OpenAI, **more: Any) -> Any:
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    options = {"tools": TOOLS, "max_tokens": 200, "seed": 5, "parallel_tool_calls": False}
    return client.chat.completions.create(model=model, messages=messages, **{**options, **more})


def check(name: str, arguments: str) -> None:
    assert name in ("lamp", "fan")
    found = json.loads(arguments)
    assert found.keys() == {"level", "on"}
    assert found["level"] in ("low", "high")
    assert isinstance(found["on"], bool)


@pytest.mark.parametrize("choice", ["required", FAN])
def test_a_call_that_must_come_comes_and_fits_its_schema(
    client: openai.OpenAI, choice: Any
) -> None:
    for seed in range(4):
        [found] = ask(client, tool_choice=choice, seed=seed).choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        [call] = found.message.tool_calls
        check(call.function.name, call.function.arguments)
        assert call.function.name == "fan" or choice == "required"


def test_a_stream_tells_the_same_call(client: openai.OpenAI) -> None:
    [whole] = ask(client, tool_choice="required").choices
    parts = [
        part
        for chunk in ask(client, tool_choice="required", stream=True)
        for part in chunk.choices[0].delta.tool_calls or ()
    ]
    joined = "".join(part.function.arguments or "" for part in parts)
    assert parts[0].function.name == whole.message.tool_calls[0].function.name
    assert joined == whole.message.tool_calls[0].function.arguments


def test_n_answers_have_a_call_each(client: openai.OpenAI) -> None:
    answer = ask(client, tool_choice="required", n=3)
    for choice in answer.choices:
        [call] = choice.message.tool_calls
        check(call.function.name, call.function.arguments)


def test_strict_tools_and_a_free_choice_go_together(client: openai.OpenAI) -> None:
    [found] = ask(client, tool_choice="auto", max_tokens=40).choices
    assert found.finish_reason in ("stop", "length", "tool_calls")


def test_a_schema_that_cannot_be_held_to_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tools"
    ask(client, tools=tools, max_tokens=2)
