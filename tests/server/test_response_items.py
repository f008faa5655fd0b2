"""Items of the Responses API to messages of a chat: turns, places of errors, packed reasoning."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.messages import read_messages
from octavo.errors import RequestError
from octavo.server.protocol.response_items import (
    chat_history,
    output_id,
    packed_reasoning,
    response_of_item,
)
from octavo.server.protocol.responses import ResponsesRequest

KEY, OTHER = "0123456789abcdef" * 2, "f" * 32


def message(text: str, role: str = "assistant", **more: Any) -> dict[str, Any]:
    part = {"type": "output_text" if role == "assistant" else "input_text", "text": text}
    return {"type": "message", "role": role, "content": [part], **more}


def reasoning(text: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": content, **more}


def call(call_id: str, **more: Any) -> dict[str, Any]:
    given = {"name": "f", "arguments": '{"a":  1}'}
    return {"type": "function_call", "call_id": call_id, **given, **more}


def result(call_id: str, output: Any = "21") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def turns(items: Any, instructions: str | None = None) -> list[str]:
    """Returns each message in short, as the chat template gets it."""
    found = []
    for one in read_messages(chat_history(items, instructions).messages):
        calls = "".join(f" {c['id']}" for c in one.get("tool_calls", ()))
        thought = f"({one['reasoning']})" if one.get("reasoning") else ""
        found.append(f"{one['role']}: {thought}{one['content']}{calls}")
    return found


def test_a_text_is_a_users_behind_the_instructions():
    assert turns("Hi", "Be kind.") == ["system: Be kind.", "user: Hi"]


def test_items_of_one_turn_are_one_message():
    items = [message("Hi", "user"), reasoning("Hm."), message("Let me look."), call("1"), call("2")]
    items += [result("1"), result("2", [{"type": "input_text", "text": "22"}]), message("Warm.")]
    assert turns(items) == [
        "user: Hi",
        "assistant: (Hm.)Let me look. 1 2",
        "tool: 21",
        "tool: 22",
        "assistant: Warm.",
    ]


def test_two_texts_are_two_messages_unless_they_are_of_one_response():
    assert len(turns([message("a"), message("b")])) == 2
    own = [message(text, id=output_id("msg", KEY, place)) for place, text in enumerate("ab")]
    assert turns(own) == ["assistant: ab"]
    other = message("c", id=output_id("msg", OTHER, 0))
    assert turns([*own, other]) == ["assistant: ab", "assistant: c"]


def test_a_text_behind_a_call_is_of_the_same_answer():
    assert turns([message("a"), call("1"), message("b"), result("1")])[0] == "assistant: ab 1"


def test_a_result_right_behind_its_call_parts_no_answer():
    first, second = (call(str(n), id=output_id("fc", KEY, n)) for n in (1, 2))
    items = [first, result("1"), second, result("2")]
    assert turns(items) == ["assistant:  1 2", "tool: 21", "tool: 21"]
    # Without an id, and of another response, it is an answer of its own.
    for later in (call("2"), call("2", id=output_id("fc", OTHER, 2))):
        assert len(turns([first, result("1"), later, result("2")])) == 4


def test_arguments_come_back_as_they_were_written():
    [told] = read_messages(chat_history([call("1")], None).messages)
    assert str(told["tool_calls"][0]["function"]["arguments"]) == '{"a":  1}'


def test_custom_calls_and_their_results():
    items = [
        {"type": "custom_tool_call", "call_id": "1", "name": "shell", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "a b"},
    ]
    assert turns(items) == ["assistant:  1", "tool: a b"]


@pytest.mark.parametrize("text", ["Hm.", "", "\xe9\U0001f600 \n" * 100])
def test_a_packed_reasoning_is_read_again(text: str):
    packed = {"type": "reasoning", "summary": [], "encrypted_content": packed_reasoning(text)}
    [told] = chat_history([packed], None).messages
    assert told["reasoning"] == text


def test_a_reasoning_is_its_content_else_what_was_packed_else_its_summary():
    summary = [{"type": "summary_text", "text": "short"}]
    item = reasoning("whole", summary=summary, encrypted_content=packed_reasoning("packed"))
    for name, told in (("content", "whole"), ("encrypted_content", "packed"), ("summary", "short")):
        assert chat_history([item], None).messages[0]["reasoning"] == told
        del item[name]
    # Another server's secret says nothing here.
    foreign = {"type": "reasoning", "summary": summary, "encrypted_content": "gAAAAABo"}
    assert chat_history([foreign], None).messages[0]["reasoning"] == "short"


def test_an_items_id_names_its_response():
    assert response_of_item(output_id("rs", KEY, 12)) == f"resp_{KEY}"
    assert response_of_item("msg_1") is None


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("text", "input[1]"),
        ({"type": "web_search_call", "id": "ws_1"}, "input[1].type"),
        ({"type": 5}, "input[1].type"),
        ({}, "input[1].type"),
        (message("a", "tool"), "input[1].role"),
        (message("a", "user", content=5), "input[1].content"),
        (message("a", "user", tools=[]), "input[1].tools"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[1].content[0]"),
        (call("1", name=None), "input[1].name"),
        (call("1", arguments={}), "input[1].arguments"),
        ({**call("1"), "call_id": None}, "input[1].call_id"),
        (result("1", 5), "input[1].output"),
        (result("1", [{"type": "input_file"}]), "input[1].output[0]"),
        (reasoning("a", content=[{"type": "text"}]), "input[1].content[0]"),
        (reasoning("a", content="a"), "input[1].content"),
        ({"type": "reasoning", "encrypted_content": "octavo1.!"}, "input[1].encrypted_content"),
        ({"type": "reasoning", "encrypted_content": 5}, "input[1].encrypted_content"),
    ],
)
def test_an_item_that_cannot_be_read_is_named(item: Any, param: str):
    body = ResponsesRequest.model_construct(input=[message("Hi", "user"), item])
    with pytest.raises(RequestError) as refused:
        body.chat.template_messages()
    told = body.renamed(refused.value)
    assert told.param == param
    assert param in str(told)
    assert "messages[" not in str(told)
