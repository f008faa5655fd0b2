"""OpenAI's agents on the demo model: chat completions and Responses, turns with tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import agents
import openai
import pytest
from agents import Agent, Model, ModelSettings, Runner, function_tool
from pydantic import BaseModel

from tests.clients.conftest import running_loop

pytestmark = [pytest.mark.demo, pytest.mark.slow]

KINDS = (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel)
LONG = ModelSettings(max_tokens=80, temperature=0.7, extra_body={"seed": 1})
CALLS = ModelSettings(max_tokens=80, temperature=0.7, tool_choice="degrees_of")
STOPS = {"min_tokens": 6, "stop": ["e", "a", "o", "i"]}
ENDS = ModelSettings(max_tokens=80, tool_choice="none", extra_body=STOPS)
"""For answers that must end of themselves."""
QUESTION = "How warm is it in Rome?"


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    degrees: int


@pytest.fixture(scope="module", autouse=True)
def no_tracing() -> None:
    agents.set_tracing_disabled(True)


@pytest.fixture(params=KINDS)
async def model(request: pytest.FixtureRequest, client: openai.AsyncOpenAI) -> Model:
    return request.param(model="demo", openai_client=client)


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_answers_without_a_loop(kind: Callable[..., Model], demo_url: str) -> None:
    with running_loop() as loop:
        client = openai.AsyncOpenAI(base_url=demo_url, api_key="none", max_retries=0)
        model = kind(model="demo", openai_client=client)
        agent = Agent(name="a", instructions="Be kind.", model=model, model_settings=ENDS)
        result = Runner.run_sync(agent, "Who are you?", max_turns=1)
        loop.run_until_complete(client.close())
    assert result.final_output


async def test_a_streamed_answer_comes_in_pieces(model: Model) -> None:
    agent = Agent(name="a", instructions="Be kind.", model=model, model_settings=ENDS)
    result = Runner.run_streamed(agent, "Who are you?", max_turns=1)
    pieces = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == result.final_output


async def test_data_comes_in_the_form_of_a_class(model: Model) -> None:
    agent = Agent(name="a", model=model, model_settings=LONG, output_type=Weather)
    result = await Runner.run(agent, QUESTION, max_turns=1)
    assert isinstance(result.final_output, Weather)


async def test_a_tool_is_called_and_its_result_goes_back(model: Model) -> None:
    asked: list[str] = []

    @function_tool
    def degrees_of(city: Literal["Rome", "Oslo"]) -> str:
        """How warm it is in a city."""
        asked.append(city)
        agent.model_settings = ENDS
        return "21 degrees"

    agent = Agent(name="a", model=model, model_settings=CALLS, tools=[degrees_of])
    result = await Runner.run(agent, QUESTION, max_turns=2)
    assert len(asked) == 1
    assert result.final_output
    kinds = [item.type for item in result.new_items]
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]


async def test_the_arguments_of_a_streamed_call_come_in_pieces(model: Model) -> None:
    asked: list[str] = []

    @function_tool
    def degrees_of(city: Literal["Rome", "Oslo"]) -> str:
        """How warm it is in a city."""
        asked.append(city)
        return "21 degrees"

    agent = Agent(
        name="a",
        model=model,
        model_settings=CALLS,
        tools=[degrees_of],
        tool_use_behavior="stop_on_first_tool",
    )
    result = Runner.run_streamed(agent, QUESTION, max_turns=1)
    events: list[Any] = [event async for event in result.stream_events()]
    kind = "response.function_call_arguments.delta"
    raw = [event.data for event in events if event.type == "raw_response_event"]
    pieces = [data.delta for data in raw if data.type == kind]
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == {"city": asked[0]}
    assert result.final_output == "21 degrees"
