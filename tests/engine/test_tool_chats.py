"""LLM.chat with tools, on a model of random weights: held to calls it makes right ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import RequestError
from tests.server.tiny_engine import write_model

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} <tool_call> {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
THINKING = TEMPLATE + "{% if thinking %}<think>\n</think>\n\n{% endif %}"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"level": {"enum": ["low", "high"]}, "on": {"type": "boolean"}},
                "required": ["level", "on"],
            },
        },
    }
    for name in ("lamp", "fan")
]
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
PARAMS = SamplingParams(temperature=1.0, max_tokens=160, seed=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = write_model(tmp_path_factory.mktemp("tools"))
    found = LLM(
        str(folder),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        kv_cache_memory_bytes=32 * 2**20,
        num_threads=1,
        chat_template=TEMPLATE,
    )
    yield found
    found.close()


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "fan"}}])
def test_a_random_model_that_must_call_calls_rightly(llm: LLM, choice: Any) -> None:
    chats = [HELLO, [{"role": "user", "content": "Lo"}]]
    outputs = llm.chat(chats, PARAMS, False, tools=TOOLS, tool_choice=choice)
    for output in outputs:
        message = output.outputs[0].message
        assert message is not None
        if output.outputs[0].finish_reason == "stop":
            assert message["content"] is None
        for name, arguments in calls_of(message)[:-1] or calls_of(message):
            assert name == "fan" or choice == "required"
            assert arguments["level"] in ("low", "high")
            assert isinstance(arguments["on"], bool)


def test_an_answer_has_one_call_where_more_are_not_wanted(llm: LLM) -> None:
    more: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    chats = [[{"role": "user", "content": word}] for word in ("Hi", "Lo", "On")]
    for output in llm.chat(chats, PARAMS, False, tools=TOOLS, **more):
        message = output.outputs[0].message
        assert message is not None
        assert len(message.get("tool_calls") or ()) <= 1


def test_a_conversation_goes_on_with_the_message_of_the_answer(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "lamp"}}
    (first,) = llm.chat(HELLO, PARAMS, False, tools=TOOLS, tool_choice=choice)
    message = first.outputs[0].message
    assert message is not None
    [call, *_] = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    (second,) = llm.chat([*HELLO, message, result], PARAMS, False, tools=TOOLS)
    assert second.outputs[0].message is not None
    prompt = llm.get_tokenizer().decode(second.prompt_token_ids)
    assert call["function"]["arguments"] in prompt


def test_what_is_held_begins_behind_the_reasoning(llm: LLM) -> None:
    more: dict[str, Any] = {"chat_template": THINKING, "tools": TOOLS, "tool_choice": "required"}
    (output,) = llm.chat(HELLO, PARAMS, False, chat_template_kwargs={"thinking": True}, **more)
    message = output.outputs[0].message
    assert message is not None
    assert calls_of({"tool_calls": message["tool_calls"][:1]})
    assert not message["content"]


def test_what_cannot_be_held_to_is_refused(llm: LLM) -> None:
    for more in ({"tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "always"}):
        with pytest.raises(RequestError) as refused:
            llm.chat(HELLO, PARAMS, False, **more)
        assert refused.value.param == "tool_choice"
