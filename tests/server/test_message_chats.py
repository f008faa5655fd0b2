"""Anthropic's messages as the chats that they become."""

from __future__ import annotations

from typing import Any

from octavo.server.protocol.messages import MessagesRequest
from tests.server.message_tools import USER, WEATHER, asked, call_block


def rendered(**fields: Any) -> list[dict[str, Any]]:
    chat = MessagesRequest.model_validate(asked(**fields)).chat()
    return [{name: one[name] for name in ("role", "content")} for one in chat.template_messages()]


def test_the_changing_billing_header_is_dropped_from_the_system() -> None:
    changing = "x-anthropic-billing-header: cc_version=2.1.36; cch=%s;"
    parts = ["You are an agent.", "Be brief."]

    def system(number: str) -> list[dict[str, Any]]:
        blocks = [changing % number, *parts]
        return [
            {"type": "text", "text": one, "cache_control": {"type": "ephemeral"}} for one in blocks
        ]

    first, second = (rendered(system=system(number)) for number in ("aa1", "bb2"))
    assert first == second
    assert first[0] == {"role": "system", "content": "You are an agent.\nBe brief."}
    assert rendered(system=changing % "c" + "\nBe brief.")[0]["content"] == "Be brief."


def test_messages_stand_where_they_stood() -> None:
    history: list[Any] = [
        *USER,
        {"role": "assistant", "content": [call_block("toolu_1")]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": "21",
                    "is_error": True,
                },
                {"type": "text", "text": "And tomorrow?", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "user", "content": "Please."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
    ]
    assert rendered(messages=history, system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm is Rome?"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "Error: 21"},
        {"role": "user", "content": "And tomorrow?\nPlease."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Go on."},
    ]


def test_tools_that_a_result_refers_to_are_told_by_name() -> None:
    found = [
        {"type": "text", "text": "Found:"},
        {"type": "tool_reference", "tool_name": "get_weather"},
    ]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": found}
    history = [
        *USER,
        {"role": "assistant", "content": [call_block("toolu_1")]},
        {"role": "user", "content": [result]},
    ]
    assert rendered(messages=history)[-1] == {"role": "tool", "content": "Found:\nget_weather"}


def test_the_choice_of_tools_is_a_chats() -> None:
    def chat(**choice: Any) -> Any:
        fields = asked(tools=[{**WEATHER, "strict": True}], tool_choice=choice)
        return MessagesRequest.model_validate(fields).chat().tool_set()

    assert chat(type="auto").choice == "auto"
    assert chat(type="none").choice == "none"
    assert chat(type="any", disable_parallel_tool_use=True).is_parallel is False
    assert chat(type="any").choice == "required"
    assert chat(type="tool", name="get_weather").named == ("get_weather",)
    assert chat(type="auto").tools[0].is_strict
