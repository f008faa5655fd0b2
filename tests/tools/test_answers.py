"""What clients get of answers: inputs of custom tools, one call where one is wanted, messages."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.tools.answers import AnswerSum, input_of, message_of, reading_of
from octavo.tools.definitions import read_tools, with_choice
from octavo.tools.detect import answer_format
from octavo.tools.reasoning_tokens import ReasoningTokens

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f"}},
    {"type": "custom", "custom": {"name": "shell"}},
]
CALLS = (
    'So:\n<tool_call>{"name": "shell", "arguments": {"input": "a\\nb"}}</tool_call>'
    '<tool_call>{"name": "f", "arguments": {"x": [1]}}</tool_call>'
)


def message(text: str, pieces: int, **more: Any) -> dict[str, Any]:
    found = answer_format("<tool_call></think>", {})
    tools = with_choice(read_tools(TOOLS), "auto", more.pop("is_parallel", None))
    reading = reading_of(found, tools, "", **more)
    assert reading is not None
    reader, total = reading.begin(), AnswerSum()
    for at in range(0, len(text), pieces):
        total.add(reader.push(text[at : at + pieces]))
    total.add(reader.push("", (), "stop"))
    return message_of(total.total())


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_message_has_the_calls_of_both_kinds(pieces: int) -> None:
    found = message(CALLS, pieces)
    assert found["content"] == "So:"
    shell, function = found["tool_calls"]
    assert shell["custom"] == {"name": "shell", "input": "a\nb"}
    assert function["function"] == {"name": "f", "arguments": '{"x": [1]}'}
    assert (shell["type"], function["type"]) == ("custom", "function")
    assert len(message(CALLS, pieces, is_parallel=False)["tool_calls"]) == 1


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_the_reasoning_is_told_left_in_or_left_out(pieces: int) -> None:
    text = "<think>hm</think>Yes"
    assert message(text, pieces)["reasoning"] == "hm"
    assert message(text, pieces)["reasoning_content"] == "hm"
    assert message(text, pieces, tells_reasoning=False)["content"] == text
    assert message(text, pieces, shows_reasoning=False) == {"role": "assistant", "content": "Yes"}


def test_plain_chats_need_no_reading() -> None:
    found, tools = answer_format("", {}), read_tools([])
    assert reading_of(found, tools, "") is None
    assert reading_of(None, read_tools(TOOLS), "") is None
    assert reading_of(found, with_choice(read_tools(TOOLS), "none"), "") is None
    channels = answer_format("", {}, tool_parser="openai")
    assert reading_of(channels, tools, "") is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input": "a"}', "a"), ('"a"', "a"), ("a b", "a b"), ('{"x": 1}', '{"x": 1}'), ("", "")],
)
def test_the_input_of_a_custom_tool_is_found(arguments: str, text: str) -> None:
    assert input_of(arguments) == text


@pytest.mark.parametrize(
    ("ids", "inside", "count"),
    [
        ([8, 1, 2, 9, 3], False, 4),
        ([1, 2, 9, 3], True, 3),
        ([1, 2, 3], False, 0),
        ([1, 8, 2], False, 2),
        ([8, 1, 9, 3, 8, 4, 9], False, 6),
    ],
)
def test_the_tokens_of_the_reasoning_are_counted(ids: list[int], inside: bool, count: int) -> None:
    whole = ReasoningTokens({8: None}, frozenset({9}), starts_inside=inside)
    whole.add(ids)
    single = ReasoningTokens({8: None}, frozenset({9}), starts_inside=inside)
    for one in ids:
        single.add([one])
    assert whole.num_tokens == single.num_tokens == count


def test_a_channel_is_reasoning_by_its_name() -> None:
    count = ReasoningTokens({5: 8}, frozenset({9}), starts_inside=False)
    count.add([8, 5, 1, 9, 8, 6, 5, 1, 9])
    assert count.num_tokens == 3
