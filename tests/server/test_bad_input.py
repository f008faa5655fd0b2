"""What the server refuses: always an OpenAI error object that names the field, never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.bad_bodies import CHAT, TEXT, USER, error_of, least_body

IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 100000}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [1, 2]}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": "one"}, "bad_words"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-4": 1}}, "logit_bias"),
        ({"logit_bias": {"4": "1"}}, "logit_bias.4"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"prefix_caching": "maybe"}, "prefix_caching"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"priority": "high"}, "priority"),
        ({"request_id": "a b"}, "request_id"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"bad_words": ["\ud800"]}, "bad_words[0]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"best_of": 4}, "best_of"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"model": 5}, "model"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {**({"messages": USER} if path == CHAT else {"prompt": "Hello"}), **fields}
    error = error_of(_post_ascii(http, path, body))
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_refused(http: httpx.Client, number: str) -> None:
    body = f'{{"prompt": "Hello", "temperature": {number}}}'
    headers = {"content-type": "application/json"}
    error = error_of(http.post(TEXT, content=body, headers=headers))
    assert error["code"] == "bad_json"
    assert f"{number} is no JSON number" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [*USER, {**USER[0], "mood": 1}]}, "messages[1].mood"),
        ({"messages": [{**USER[0], "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{**USER[0], "name": "\ud800"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "logprobs": 2}, "logprobs"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": USER, "audio": {"voice": "x"}}, "audio"),
        (
            {"messages": USER, "chat_template_kwargs": {"documents": [{"text": "x"}]}},
            "chat_template_kwargs.documents",
        ),
        (
            {"messages": USER, "chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ({"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": USER, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_bad_chat_input_is_refused(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(_post_ascii(http, CHAT, body))["param"] == param


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], None, 5, [1.5], ["a", 1], [-1], [10**9], [[1], "a"], {"a": 1}, "\ud800"],
)
def test_a_bad_prompt_is_refused(http: httpx.Client, prompt: object) -> None:
    body = {"prompt": prompt, "add_special_tokens": False}
    assert error_of(_post_ascii(http, TEXT, body))["param"] == "prompt"


def test_too_many_prompts_are_refused(http: httpx.Client) -> None:
    assert error_of(http.post(TEXT, json={"prompt": ["a"] * 1025}))["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_refused_before_a_stream_begins(
    client: openai.OpenAI, model: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[5] * 600, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "600" in str(caught.value)
    assert "512" in str(caught.value)


def test_one_bad_prompt_of_several_refuses_the_call(http: httpx.Client) -> None:
    error_of(http.post(TEXT, json={"prompt": [[5], [5] * 600, [6]]}))


@pytest.mark.parametrize(
    ("path", "name", "hint"),
    [
        (TEXT, "max_completion_tokens", "did you mean max_tokens?"),
        (TEXT, "messages", "did you mean prompt?"),
        (CHAT, "prompt", "did you mean messages?"),
        (CHAT, "max_new_tokens", "did you mean max_tokens?"),
        (CHAT, "extra_body", "put what it holds into the body itself"),
        (CHAT, "chat_id", "see GET /docs for the known ones"),
    ],
)
def test_a_hint_is_right_or_there_is_none(
    http: httpx.Client, path: str, name: str, hint: str
) -> None:
    assert error_of(http.post(path, json={**least_body(path), name: 1}))["message"].endswith(hint)


def test_a_misspelt_field_is_told_its_nearest_name(http: httpx.Client) -> None:
    error = error_of(http.post(TEXT, json={"prompt": "x", "temperatur": 1}))
    assert error["param"] == "temperatur"
    assert "did you mean temperature?" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"", b"[1", b"\xff\xfe{}", b'{"prompt": "a"} x', b"[" * 99999),
        *(b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16")),
        *(b'{"prompt": "\xff"}', b'{"prompt": "a\x01b"}', b"{'prompt': 'a'}", b'{"prompt": 01}'),
        *(b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "metadata": {"x": 1, "x": 1}}'),
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "metadata": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
)
def test_broken_json_is_refused(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert error_of(http.post(TEXT, content=body, headers=headers))["code"] == "bad_json"


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"prompt"'])
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, body: bytes) -> None:
    error_of(http.post(TEXT, content=body, headers={"content-type": "application/json"}))


def test_a_form_is_told_the_content_type(http: httpx.Client) -> None:
    assert "Content-Type" in error_of(http.post(TEXT, content='{"prompt": "x"}'))["message"]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "\ud800"}, "model"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]"),
        ({"metadata": {"a": [{"b": "\ud800"}]}}, "metadata.a[0].b"),
        ({"\ud800": 1}, None),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    assert error_of(_post_ascii(http, TEXT, {"prompt": "x", **fields}))["param"] == param


def test_an_unknown_route_is_not_found(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "unknown_route"
    assert "GET /v1/models lists" in error_of(http.get("/v1"), 404)["message"]
    assert "did you mean /v1/models, without" in error_of(http.get("/v1/models/"), 404)["message"]
    assert "close the connection" in error_of(http.post("/abort_requests"), 404)["message"]


def test_a_wrong_method_is_not_allowed(http: httpx.Client) -> None:
    response = http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("tokens", [[2**31], [-1], ["a"], "abc", None])
def test_bad_tokens_are_not_detokenised(http: httpx.Client, tokens: object) -> None:
    param = error_of(http.post("/detokenize", json={"tokens": tokens}))["param"]
    assert param.removesuffix("[0]") == "tokens"


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"messages": 5}, {"prompt": "a", "x": 1}])
def test_a_bad_body_is_not_tokenised(http: httpx.Client, body: dict[str, Any]) -> None:
    error_of(http.post("/tokenize", json=body))


def test_a_body_over_the_limit_is_refused_whether_it_says_its_length_or_not(
    start_server: Any,
) -> None:
    server = start_server(max_body_bytes=1000)
    headers = {"content-type": "application/json"}
    body = b'{"prompt": "' + b"x" * 2000 + b'"}'
    chunks = [body[i : i + 100] for i in range(0, len(body), 100)]
    for content in (body, iter(chunks)):
        response = httpx.post(f"{server.url}{TEXT}", content=content, headers=headers)
        error = error_of(response, 413)
        assert error["code"] == "body_too_large"
        assert "1000 bytes" in error["message"]
    assert server.engine.requests == []
    small = httpx.post(f"{server.url}{TEXT}", json={"prompt": "x"})
    assert small.status_code == 200


def _post_ascii(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Sends lone surrogates as escapes, which httpx's own JSON cannot."""
    headers = {"content-type": "application/json"}
    return http.post(path, content=json.dumps(body), headers=headers)
