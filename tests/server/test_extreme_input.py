"""Numbers, depths and sizes that nothing can hold, and what errors say of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from octavo.request_fields import REFUSED
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.tokens import TokenizeTextRequest
from tests.server.bad_bodies import CHAT, TEXT, USER, error_of, least_body

HUGE = (10**29, -(10**29), int("9" * 4000), 1.7e308, [10**29], [[10**29]], {"1" * 5000: 1})
MODELS = {CHAT: ChatRequest, TEXT: CompletionRequest, "/tokenize": TokenizeTextRequest}


@pytest.mark.parametrize("path", MODELS)
def test_no_field_takes_a_number_that_nothing_can_hold(http: httpx.Client, path: str) -> None:
    for field in MODELS[path].model_fields:
        for value in HUGE:
            if field in ("chat_template_kwargs", "guided_json") and isinstance(value, dict):
                continue  # The template's and the schema's business, with names of any length.
            response = http.post(path, json={**least_body(path), field: value})
            error = error_of(response)
            assert len(response.content) < 2000
            assert error["param"].partition("[")[0].partition(".")[0] == field, (field, value)


@pytest.mark.parametrize("place", ["chat_template_kwargs", "documents", "messages"])
@pytest.mark.parametrize("depth", [3, 60, 70, 3000])
def test_no_depth_is_an_internal_error(http: httpx.Client, place: str, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    value = {"chat_template_kwargs": deep, "documents": f"[{deep}]"}.get(place, f"[{deep}]")
    rest = {} if place == "messages" else {"messages": USER}
    body = f'{{"{place}": {value}, "max_tokens": 1, {json.dumps(rest)[1:]}'.replace(", }", "}")
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 or (place == "chat_template_kwargs" and depth < 64)


@pytest.mark.parametrize("path", MODELS)
def test_null_asks_for_nothing(http: httpx.Client, path: str) -> None:
    model = MODELS[path]
    names = {*model.model_fields, *model.ignored_fields, *model.refused_fields}
    body = {**dict.fromkeys(names), **least_body(path), "add_special_tokens": None}
    assert http.post(path, json=body).status_code == 200
    options = {"include_usage": None, "continuous_usage_stats": None}
    if path != "/tokenize":
        body |= {"stream": True, "stream_options": options, "max_tokens": 1}
        assert http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_known_elsewhere_passes_if_it_asks_for_nothing(
    http: httpx.Client, path: str
) -> None:
    model = ChatRequest if path == CHAT else CompletionRequest
    for name, (_, neutral) in REFUSED.items():
        if name in model.model_fields:
            continue  # known on this route
        for value in neutral:
            body = {**least_body(path), "max_tokens": 1, name: value}
            assert http.post(path, json=body).status_code == 200, name
        error = error_of(http.post(path, json={**least_body(path), name: {"odd": 1}}))
        assert (error["param"], error["code"]) == (name, "unsupported_field")
        assert error["message"].startswith(f"{name} is not supported: ")
        assert error["message"].count("not supported") == 1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "reasoning": "Because."},
        {"role": "assistant", "content": "x", "reasoning_content": "Because."},
        {"role": "assistant", "content": "x", "reasoning": None, "reasoning_content": None},
        {"role": "assistant", "content": None, "reasoning": "Because."},
        {"role": "assistant", "content": "x", "id": "msg_1", "audio": None, "function_call": None},
        {"role": "assistant", "content": "x", "tool_calls": [], "annotations": [], "refusal": None},
        {"role": "assistant", "content": [{"type": "output_text", "text": "x"}], "mood": None},
    ],
)
def test_answers_of_any_server_may_be_sent_back(
    http: httpx.Client, message: dict[str, Any]
) -> None:
    body = {"messages": [*USER, message, *USER], "max_tokens": 1}
    assert http.post(CHAT, json=body).status_code == 200


def test_errors_name_the_fields_that_the_client_sent(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "Hello " * 300}]
    assert error_of(http.post(CHAT, json={"messages": long}))["param"] == "messages"
    none = {"messages": USER, "max_completion_tokens": 0}
    assert error_of(http.post(CHAT, json=none))["param"] == "max_completion_tokens"


def test_errors_repeat_no_more_of_a_body_than_helps(http: httpx.Client) -> None:
    long = "x" * 100_000
    for body in (
        {"prompt": "a", long: 1},
        {"prompt": "a", "model": long},
        {"prompt": "a", "logit_bias": {long: 1}},
        {"prompt": "a", "request_id": long},
        {"prompt": "a", "stream_options": {long: 1}},
    ):
        assert len(http.post(TEXT, json=body).content) < 2000
    for message in ({"role": long}, {"role": "user", long: 1}, {"content": [{"type": long}]}):
        body = {"messages": [{"role": "user", **message}]}
        assert len(http.post(CHAT, json=body).content) < 2000


@pytest.mark.parametrize(
    ("body", "wording"),
    [
        ({"messages": []}, "messages must be a list of at least 1 element"),
        ({"messages": USER, "stop": [""]}, "stop[0] must be a text of at least 1 character"),
        ({"messages": USER, "stop": [3]}, "stop[0] must be a string"),
        ({"messages": USER, "stop": 3}, "stop must be a string or a list"),
        ({"messages": USER, "stream": "yes"}, "stream must be true or false"),
        ({"messages": USER, "reasoning_effort": "banana"}, "reasoning_effort must be one of"),
        ({"messages": [{"role": "user"}]}, "must be a string or a list of text parts"),
        ({"messages": USER, "tools": [{}]}, "tools[0].function must be an object with a name"),
        ({"messages": USER, "functions": [{}]}, "use tools and tool_choice in a chat"),
    ],
)
def test_errors_say_what_a_field_must_be(
    http: httpx.Client, body: dict[str, Any], wording: str
) -> None:
    assert wording in error_of(http.post(CHAT, json=body))["message"]
