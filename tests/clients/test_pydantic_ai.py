"""pydantic-ai's agents on the demo model: chat completions and Responses, both its ways to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, UsageLimits
from pydantic_ai.messages import ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.conftest import running_loop

pytestmark = [pytest.mark.demo, pytest.mark.slow]

SHORT = ModelSettings(max_tokens=8, temperature=0.7, seed=1)
LONG = ModelSettings(max_tokens=80, temperature=0.7, seed=1, parallel_tool_calls=False)
QUESTION = "How warm is it in Rome?"


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    degrees: int


KINDS = (OpenAIChatModel, OpenAIResponsesModel)


@pytest.fixture(params=KINDS)
async def model(request: pytest.FixtureRequest, client: openai.AsyncOpenAI) -> Model:
    return request.param("demo", provider=OpenAIProvider(openai_client=client))


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_answers_without_a_loop(kind: Callable[..., Model], demo_url: str) -> None:
    with running_loop() as loop:
        client = openai.AsyncOpenAI(base_url=demo_url, api_key="none", max_retries=0)
        model = kind("demo", provider=OpenAIProvider(openai_client=client))
        result = Agent(model, model_settings=SHORT).run_sync(QUESTION)
        loop.run_until_complete(client.close())
    assert result.output
    assert result.usage.output_tokens == 8


async def test_a_streamed_answer_comes_in_pieces(model: Model) -> None:
    agent = Agent(model, model_settings=SHORT)
    async with agent.run_stream(QUESTION) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 3
    assert "".join(pieces) == await result.get_output()
    assert result.usage.output_tokens == 8


async def test_data_comes_as_a_call_of_the_output_tool(model: Model) -> None:
    result = await Agent(model, output_type=Weather, model_settings=LONG).run(QUESTION)
    assert isinstance(result.output, Weather)
    assert result.usage.requests == 1


async def test_data_comes_as_a_text_of_the_schema(model: Model) -> None:
    agent = Agent(model, output_type=NativeOutput(Weather), model_settings=LONG)
    result = await agent.run(QUESTION)
    assert isinstance(result.output, Weather)
    assert result.usage.requests == 1


def calls_first(ctx: RunContext[None]) -> ModelSettings:
    return LONG | {"tool_choice": ["degrees_of"]} if ctx.run_step == 1 else SHORT


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_tool_is_called_and_its_result_goes_back(model: Model, streams: bool) -> None:
    asked: list[str] = []
    agent = Agent(model, model_settings=calls_first)

    @agent.tool_plain
    def degrees_of(city: Literal["Rome", "Oslo"]) -> str:
        """How warm it is in a city."""
        asked.append(city)
        return "21 degrees"

    limits = UsageLimits(request_limit=2)
    if streams:
        async with agent.run_stream(QUESTION, usage_limits=limits) as result:
            output = await result.get_output()
    else:
        result = await agent.run(QUESTION, usage_limits=limits)
        output = result.output
    assert output
    assert asked
    assert set(asked) <= {"Rome", "Oslo"}
    parts = [part for message in result.all_messages() for part in message.parts]
    called = [part for part in parts if isinstance(part, ToolCallPart)]
    told = [part for part in parts if isinstance(part, ToolReturnPart)]
    assert [one.tool_call_id for one in called] == [one.tool_call_id for one in told]
    assert isinstance(result.all_messages()[-1], ModelResponse)
