"""POST /v1/completions: prompts of every kind, echo, log-probabilities, streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest


def test_a_text_is_continued(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Once", max_tokens=6, extra_body={"ignore_eos": True}
    )
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_sixteen_tokens_are_generated_unless_told_otherwise(
    client: openai.OpenAI, model: str
) -> None:
    answer = client.completions.create(model=model, prompt="Once", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_choices_of_several_prompts_are_in_order(client: openai.OpenAI, model: str) -> None:
    greedy = {"model": model, "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**greedy, prompt=["One", "Three", "Seven"], n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = client.completions.create(**greedy, prompt="Three")
    assert answer.choices[2].text == alone.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        4 for choice in answer.choices if choice.finish_reason == "length"
    )


@pytest.mark.parametrize("many", [False, True])
def test_token_ids_are_prompts_too(http: httpx.Client, many: bool) -> None:
    ids = http.post("/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    common = {"max_tokens": 4, "temperature": 0}
    text = http.post("/v1/completions", json={"prompt": "Once upon", **common}).json()
    prompt = [ids, ids] if many else ids
    answer = http.post("/v1/completions", json={"prompt": prompt, **common}).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [text["choices"][0]["text"]] * (2 if many else 1)


def test_a_stream_of_several_prompts_spells_the_whole_answer(
    lax_client: openai.OpenAI, model: str
) -> None:
    request: dict[str, Any] = {
        "model": model,
        "prompt": ["One", "Two"],
        "max_tokens": 7,
        "temperature": 0,
    }
    whole = lax_client.completions.create(**request)
    texts, ends = {0: "", 1: ""}, []
    options: Any = {"include_usage": True}
    usage = None
    for chunk in lax_client.completions.create(**request, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert sorted(ends) == [0, 1]
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_prompt_and_output(http: httpx.Client, stream: bool) -> None:
    body = {
        "prompt": "Once upon",
        "max_tokens": 3,
        "echo": True,
        "logprobs": 2,
        "ignore_eos": True,
    }
    num_prompt = http.post("/tokenize", json={"prompt": "Once upon"}).json()["count"]
    choices = _choices(http, {**body, "stream": stream})
    text = "".join(choice["text"] for choice in choices)
    assert text.startswith("Once upon")
    parts = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for choice in choices:
        for name, values in parts.items():
            values += choice["logprobs"][name]
    assert {len(values) for values in parts.values()} == {num_prompt + 3}
    assert parts["token_logprobs"][0] is None
    assert all(value <= 0 for value in parts["token_logprobs"][1:])
    offsets = parts["text_offset"]
    assert offsets == sorted(offsets)
    prompt = list(zip(parts["tokens"], offsets, strict=True))[:num_prompt]
    shown = [(token, offset) for token, offset in prompt if token in text]
    assert len(shown) >= 2
    assert all(text.startswith(token, offset) for token, offset in shown), shown


def test_zero_tokens_with_echo_give_the_prompt_alone(http: httpx.Client) -> None:
    body = {"prompt": "Once upon", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "Once upon"
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_a_map_for_each_token(http: httpx.Client) -> None:
    body = {"prompt": "Once upon", "max_tokens": 1, "prompt_logprobs": 1}
    answer = http.post("/v1/completions", json=body).json()
    positions = answer["choices"][0]["prompt_logprobs"]
    assert len(positions) == answer["usage"]["prompt_tokens"]
    assert positions[0] is None
    assert all("logprob" in entry for p in positions[1:] for entry in p.values())


def test_a_prompt_may_be_cut_from_the_left(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True}
    cut = http.post("/v1/completions", json={**body, "truncate_prompt_tokens": 2}).json()
    assert cut["choices"][0]["prompt_token_ids"] == ids[-2:]
    long = {**body, "prompt": ids * 200, "truncate_prompt_tokens": -1}
    answer = http.post("/v1/completions", json=long).json()
    limit = http.post("/tokenize", json={"prompt": "a"}).json()["max_model_len"]
    assert answer["usage"]["prompt_tokens"] == limit - 1


def _choices(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All choices of an answer, streamed or not."""
    response = http.post("/v1/completions", json=body)
    if not body["stream"]:
        return response.json()["choices"]
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    return [choice for chunk in chunks for choice in chunk["choices"]]
