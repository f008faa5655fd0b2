"""One reading of messages for the server and for LLM."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.messages import read_messages
from octavo.errors import RequestError

USER = {"role": "user", "content": "Hi"}


def test_parts_of_text_are_put_together_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {**USER, "name": "Ann"}]
    assert read_messages(messages) == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "Hi", "name": "Ann"},
    ]


def test_an_answer_of_the_api_can_be_sent_back():
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": []}
    assert read_messages([USER, answer])[1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_the_reasoning_of_an_answer_is_handed_to_the_template(name: str):
    answer = {"role": "assistant", "content": "x", name: "Because.", "id": "msg_1"}
    assert read_messages([USER, answer])[1] == {
        "role": "assistant",
        "content": "x",
        "reasoning": "Because.",
        "reasoning_content": "Because.",
    }
    assert read_messages([{**USER, name: "Because."}]) == [USER]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Hi", "messages[1]"),
        (None, "messages[1]"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": "\ud800"}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({**USER, "mood": 1}, "messages[1].mood"),
        ({**USER, "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({**USER, "name": 5}, "messages[1].name"),
        ({"role": "assistant", "content": "x", "reasoning": 5}, "messages[1].reasoning"),
    ],
)
def test_what_cannot_be_read_is_refused_by_place(message: Any, param: str):
    with pytest.raises(RequestError) as refused:
        read_messages([USER, message])
    assert refused.value.param == param
    assert param in str(refused.value)


@pytest.mark.parametrize("messages", ["Hi", USER, 5, None, {1, 2}])
def test_what_is_no_list_is_refused(messages: Any):
    with pytest.raises(RequestError, match="messages must be a list of messages"):
        read_messages(messages)
