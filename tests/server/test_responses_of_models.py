"""The Responses API on a real engine of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from octavo.config import ServerConfig
from tests.server.conftest import ServerThread
from tests.server.strict_client import client_of
from tests.server.tiny_engine import tiny_engine


class Lamp(pydantic.BaseModel):
    level: Literal["low", "high"]
    on: bool


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} <tool_call> {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a real engine."""
    engine = tiny_engine(tmp_path_factory.mktemp("responses"), chat_template=TEMPLATE)
    server = ServerThread(engine, ServerConfig(port=0, served_model_name=("tiny",)))
    with client_of(server.url) as strict:
        yield strict
    server.end()


def test_a_text_that_is_held_to_a_schema_is_parsed(real: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "Hi", "max_output_tokens": 200}
    answer = real.responses.parse(text_format=Lamp, **options)
    assert isinstance(answer.output_parsed, Lamp)
    with real.responses.stream(text_format=Lamp, **options) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Lamp)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "lamp"}])
def test_a_call_that_must_come_comes_and_fits_its_schema(real: openai.OpenAI, choice: Any) -> None:
    tool = openai.pydantic_function_tool(Lamp, name="lamp")["function"]
    answer = real.responses.create(
        model="tiny",
        input="Hi",
        tools=[{"type": "function", **tool}],  # type: ignore[list-item]
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    [call] = answer.output
    assert call.type == "function_call"
    Lamp.model_validate_json(call.arguments)


def test_log_probabilities_are_those_of_the_text(real: openai.OpenAI) -> None:
    answer = real.responses.create(model="tiny", input="Hi", max_output_tokens=8, top_logprobs=3)
    [message] = answer.output
    assert message.type == "message"
    [part] = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert all(len(one.top_logprobs) == 3 for one in part.logprobs)
