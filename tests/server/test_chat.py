"""POST /v1/chat/completions through OpenAI's strict client: whatever the engine says, the shape."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_an_answer_has_text_a_reason_and_usage(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_completion_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == model
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_says_the_role_first_and_usage_last(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_spells_the_same_text_as_a_whole_answer(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=12, temperature=0
    )
    stream = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=12, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_continuous_usage_grows_with_the_stream(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=4,
        stream=True,
        extra_body={
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": True,
        },
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_n_samples_are_numbered(client: openai.OpenAI, model: str, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "n": 3,
        "max_tokens": 4,
        "seed": 1,
    }
    if stream:
        chunks = client.chat.completions.create(**request, stream=True)
        ended = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert sorted(ended) == [0, 1, 2]
    else:
        answer = client.chat.completions.create(**request)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_logprobs_come_with_the_asked_number_of_alternatives(
    client: openai.OpenAI, model: str
) -> None:
    request: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 5, "logprobs": True}
    extra = {"ignore_eos": True}
    answer = client.chat.completions.create(**request, top_logprobs=3, extra_body=extra)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)
    assert all(-9999 <= entry.logprob <= 0 for entry in logprobs.content)
    assert any(entry.bytes for entry in logprobs.content)

    bare = client.chat.completions.create(**request, extra_body=extra)
    assert bare.choices[0].logprobs is not None
    assert [e.top_logprobs for e in bare.choices[0].logprobs.content or []] == [[]] * 5


def test_streamed_logprobs_cover_every_token_once(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=6,
        logprobs=True,
        top_logprobs=1,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    entries = [
        entry
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert len(entries) == 6


def test_text_parts_read_as_one_text(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    ids = [
        http.post("/tokenize", json={"messages": [{"role": "user", "content": content}]}).json()
        for content in (parts, "Hello")
    ]
    assert ids[0]["tokens"] == ids[1]["tokens"]


def test_token_ids_are_returned_when_asked(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert len(answer["choices"][0]["token_ids"]) == 3
    asked = http.post("/tokenize", json={"messages": HELLO}).json()
    assert answer["prompt_token_ids"] == asked["tokens"]


def test_echo_repeats_the_assistants_beginning(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once"}]
    body = {
        "messages": messages,
        "max_tokens": 3,
        "echo": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("Once")


def test_an_answer_may_be_sent_back_as_a_message(client: openai.OpenAI, model: str) -> None:
    first = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4)
    history = [*HELLO, first.choices[0].message.model_dump(), *HELLO]
    second = client.chat.completions.create(model=model, messages=history, max_tokens=4)
    assert second.choices[0].message.content is not None


def test_fields_without_effect_are_welcome(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        tool_choice="none",
        tools=[],
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_64_streams_at_once_all_end(base_url: str, model: str) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> int:
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Count to {number}"}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        last = [chunk async for chunk in chunks][-1]
        assert last.usage is not None
        return last.usage.completion_tokens

    async def run() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{base_url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            return await asyncio.gather(*(stream(client, i) for i in range(64)))

    assert asyncio.run(run()) == [8] * 64
